//! aha's wire protocol: generated types, conversions to and from the domain, and who may call whom.
#![forbid(unsafe_code)]

pub mod caller;
mod convert;
pub mod guard;

pub use convert::BadMessage;

/// Package `aha.v1`.
#[expect(clippy::allow_attributes, clippy::too_many_lines, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("aha.v1");

    /// The protocol's descriptors, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
