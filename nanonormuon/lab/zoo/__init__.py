"""The neighbours' optimizers, a file each: optim.name=zoo:FILE. Copy one to begin your own."""
