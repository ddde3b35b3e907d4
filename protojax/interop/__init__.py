"""Files and weights of other libraries: how they are read, what their arrays are called."""
