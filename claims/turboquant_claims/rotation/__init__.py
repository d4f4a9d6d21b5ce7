"""What does a random rotation do to a vector's coordinates?"""
