//! What is said to a network block device, after the NBD protocol specification; no input or output.
