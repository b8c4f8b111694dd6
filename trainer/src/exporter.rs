//! Prometheus metrics of a run, served by rank 0.

use aha_core::config::{Credentials, RunConfig};
use aha_proto::guard::serving;
use aha_proto::metrics::MetricsServer;
use tokio::runtime::Handle;

use crate::session::Session;
use crate::world::World;

/// The address of `logging.metrics_address`, which does not answer yet.
#[derive(Debug)]
pub struct Exporter {
    server: MetricsServer,
    runtime: Handle,
}

impl Exporter {
    /// Takes the address, where one is asked for and this is rank 0. It is served on `runtime`.
    ///
    /// # Errors
    /// If the address is not to be had, or anyone on other machines could read there.
    pub fn bind(
        config: &RunConfig,
        credentials: &Credentials,
        world: &World,
        runtime: &Handle,
    ) -> anyhow::Result<Option<Self>> {
        let Some(address) = config.logging.metrics_address.filter(|_| world.is_main()) else { return Ok(None) };
        let _entered = runtime.enter();
        let server = MetricsServer::bind("logging.metrics_address", address, &serving(credentials))?;
        Ok(Some(Self { server, runtime: runtime.clone() }))
    }

    /// Answers as long as the runtime lives, with the newest step of `session`.
    pub fn serve(self, session: &Session) {
        let Some(newest) = session.loggers.as_ref().map(|loggers| loggers.newest()) else { return };
        let run = session.config.run.name.clone();
        let page = move || {
            let page = newest.page(&run);
            async move { Ok(page) }
        };
        tracing::info!("metrics of this run are at {}", self.server.address());
        self.runtime.spawn(self.server.serve(page));
    }
}
