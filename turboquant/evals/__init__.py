"""What does the method cost on data? Evaluations that return raw measurements; the judge concludes."""
