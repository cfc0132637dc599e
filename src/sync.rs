//! The lock of those parts whose interleavings are checked by a model (`tests/model`), which puts
//! another one in its place.

pub(crate) use parking_lot::Mutex;
