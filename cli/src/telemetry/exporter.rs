//! Spans for an OpenTelemetry collector (feature `otel`): the phases of a step, and requests.
//!
//! What a collector is told are spans and events of aha's own crates, from `debug` on, whatever `RUST_LOG` says. The
//! standard's variables say where it is (`OTEL_EXPORTER_OTLP_ENDPOINT`) and how it is spoken to.

use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Runtime;
use tracing::Level;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;

use crate::logs::BoxedLayer;

const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
const SERVICE: &str = "OTEL_SERVICE_NAME";
/// For the last spans of a process to be taken.
const FAREWELL: Duration = Duration::from_secs(5);

/// Sends what is left when it is dropped.
#[derive(Debug)]
pub(crate) struct Telemetry {
    provider: SdkTracerProvider,
    /// The connection lives there.
    _runtime: Runtime,
}

impl Telemetry {
    /// Sends spans as those of `role`, where the environment names a collector.
    ///
    /// # Errors
    /// If what the environment says cannot be used.
    pub(crate) fn from_environment(role: &str) -> Result<Option<Self>> {
        let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if !ENDPOINTS.iter().any(is_set) {
            return Ok(None);
        }
        Self::start(role, None).map(Some)
    }

    /// `endpoint` in place of the environment's.
    fn start(role: &str, endpoint: Option<&str>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.context("starting the telemetry's runtime")?;
        // The exporter connects on the runtime that it is made in.
        let entered = runtime.enter();
        let exporter = SpanExporter::builder().with_tonic();
        let exporter = match endpoint {
            Some(endpoint) => exporter.with_endpoint(endpoint),
            None => exporter,
        };
        let exporter = exporter.build().with_context(|| format!("{}: no spans can be sent there", ENDPOINTS[0]))?;
        let process = i64::from(std::process::id());
        let mut resource = Resource::builder()
            .with_attributes([KeyValue::new("aha.role", role.to_owned()), KeyValue::new("process.pid", process)]);
        if std::env::var_os(SERVICE).is_none() {
            resource = resource.with_service_name("aha");
        }
        let provider =
            SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter).build();
        drop(entered);
        Ok(Self { provider, _runtime: runtime })
    }

    pub(crate) fn layer(&self) -> BoxedLayer {
        let layer = tracing_opentelemetry::layer().with_tracer(self.provider.tracer("aha"));
        layer.with_filter(Targets::new().with_target("aha", Level::DEBUG)).boxed()
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FAREWELL) {
            tracing::warn!("the last spans were not sent: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
    use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response, Status};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            call: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            self.0.lock().unwrap().push(call.into_inner());
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    #[test]
    fn a_collector_gets_own_spans_with_their_parents_and_the_role() {
        let collector = Collector::default();
        let runtime = Runtime::new().unwrap();
        let incoming = runtime.block_on(async { TcpIncoming::bind("127.0.0.1:0".parse().unwrap()) }).unwrap();
        let endpoint = format!("http://{}", incoming.local_addr().unwrap());
        let server = Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        runtime.spawn(server.serve_with_incoming(incoming));

        let telemetry = Telemetry::start("trainer", Some(&endpoint)).unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(telemetry.layer()), || {
            let _step = tracing::debug_span!("train_step", step = 7).entered();
            drop(tracing::debug_span!("train").entered());
            drop(tracing::error_span!(target: "h2", "frame").entered());
        });
        drop(telemetry);

        let requests = collector.0.lock().unwrap();
        let of_resources: Vec<_> = requests.iter().flat_map(|request| &request.resource_spans).collect();
        let attributes = format!("{:?}", of_resources[0].resource);
        assert!(attributes.contains("aha.role") && attributes.contains("trainer"), "{attributes}");
        let spans: Vec<_> =
            of_resources.iter().flat_map(|resource| &resource.scope_spans).flat_map(|scope| &scope.spans).collect();
        let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["train", "train_step"], "those of other crates are left out");
        assert_eq!(spans[0].parent_span_id, spans[1].span_id);
        assert!(spans[1].attributes.iter().any(|attribute| attribute.key == "step"), "{:?}", spans[1]);
        assert!(spans[1].end_time_unix_nano >= spans[0].end_time_unix_nano);
    }
}
