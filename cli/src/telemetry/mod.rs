//! What an OpenTelemetry collector is told, where this binary was built with the feature `otel`.

#[cfg(feature = "otel")]
mod exporter;
#[cfg(not(feature = "otel"))]
mod nothing;

#[cfg(feature = "otel")]
pub(crate) use exporter::Telemetry;
#[cfg(not(feature = "otel"))]
pub(crate) use nothing::Telemetry;
