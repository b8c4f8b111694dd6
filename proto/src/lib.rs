//! aha's wire protocol: generated types, conversions to and from the domain, who may call whom, and metrics over HTTP.
#![forbid(unsafe_code)]

pub mod caller;
pub mod connections;
mod convert;
pub mod guard;
pub mod metrics;

pub use convert::BadMessage;

/// Package `aha.v1`.
#[expect(clippy::allow_attributes, clippy::too_many_lines, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("aha.v1");

    /// The protocol's descriptors, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
