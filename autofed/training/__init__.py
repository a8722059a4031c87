"""Training a network at one site: the loop, the network, its loss, batches, devices and their speed."""
