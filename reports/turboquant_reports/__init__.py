"""The reporter: results and the ledger in, HTML, Markdown and a badge out."""
