"""Does the paper's lower bound hold, and what is the limit really?"""
