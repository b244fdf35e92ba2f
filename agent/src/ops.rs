//! The operations that model code is written against.
//!
//! Today there is one implementation, on plain Burn tensors: it runs wherever Burn runs, can be differentiated, and is
//! what faster kernels will be tested against. Kernels of our own join as a Burn backend extension behind these names.

pub mod reference;

pub use reference::{Linear, Rotation, attend, gather, rms_norm, swiglu};
