"""How large is the squared error, and on which inputs?"""
