//! aha's wire protocol: generated types, and conversions to and from the domain.
#![forbid(unsafe_code)]

mod convert;

pub use convert::BadMessage;

/// Package `aha.v1`.
#[expect(clippy::allow_attributes, clippy::too_many_lines, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("aha.v1");

    /// The protocol's descriptors, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
