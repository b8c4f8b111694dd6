//! Without the feature `otel` there is no telemetry.

use anyhow::Result;

use crate::logs::BoxedLayer;

/// There is none.
#[derive(Debug)]
pub(crate) enum Telemetry {}

impl Telemetry {
    pub(crate) fn from_environment(_role: &str) -> Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn layer(&self) -> BoxedLayer {
        match *self {}
    }
}
