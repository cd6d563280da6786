//! Connections that break at every point of the stream.
