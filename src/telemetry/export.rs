//! OpenTelemetry's SDK, put together: exporters over this daemon's connections, queues of its own.
//!
//! What a flag does not say is read from the standard variables: `OTEL_EXPORTER_OTLP_ENDPOINT` and
//! `..._TRACES_ENDPOINT`, `..._LOGS_ENDPOINT`, `..._PROTOCOL`, `..._HEADERS`, `OTEL_SERVICE_NAME`,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` with its `_ARG`, `OTEL_TRACES_EXPORTER` and
//! `OTEL_LOGS_EXPORTER` (`none`), `OTEL_SDK_DISABLED`.

use std::{env, time::Duration};

use hyper_util::rt::TokioIo;
use opentelemetry::{Context, InstrumentationScope, trace::TracerProvider};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, SpanExporter, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter as _, LogProcessor, SdkLogRecord, SdkLoggerProvider},
    trace::{SdkTracerProvider, Span, SpanData, SpanExporter as _, SpanProcessor},
};
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, Registry, filter::Targets};

use super::{
    Collector, TelemetryError,
    batch::{self, Export, Queue, Sending},
    rate_limit::Limited,
};
use crate::{
    version,
    wire::{dial, spans::TARGET},
};

/// How long connecting to a collector may take.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// Both kinds of telemetry, as far as they are wanted.
type Layers = Vec<Box<dyn Layer<Registry> + Send + Sync>>;

/// What sends, beside the daemon.
#[derive(Debug)]
pub(super) struct Exports {
    sending: Vec<Sending>,
    /// Dropped, they would tell their processors to end.
    _providers: (Option<SdkTracerProvider>, Option<SdkLoggerProvider>),
}

impl Exports {
    /// Sends what waits, within this time.
    pub(super) async fn flush(self, time: Duration) {
        let deadline = Instant::now() + time;
        for sending in self.sending {
            sending.finish(deadline).await;
        }
    }
}

/// Starts to send to a collector, if there is one.
pub(super) fn start(
    collector: Option<&Collector>,
) -> Result<Option<(Exports, Layers)>, TelemetryError> {
    if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(None);
    }
    let (mut sending, mut layers): (_, Layers) = (Vec::new(), Vec::new());
    let mut providers = (None, None);
    let place = place(collector, "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")?;
    if let Some(place) = place {
        let exporter = SpanExporter::builder().with_tonic().with_channel(channel(place)).build();
        let mut exporter = exporter.map_err(failed)?;
        let resource = resource();
        exporter.set_resource(&resource);
        let (queue, task) = batch::start("traces", Spans(exporter));
        sending.push(task);
        let provider =
            SdkTracerProvider::builder().with_resource(resource).with_span_processor(queue).build();
        let layer = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("envd"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_level(false)
            .with_tracked_inactivity(false)
            .with_filter(Targets::new().with_target(TARGET, LevelFilter::INFO));
        layers.push(layer.boxed());
        providers.0 = Some(provider);
    }
    let place = self::place(collector, "OTEL_LOGS_EXPORTER", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT")?;
    if let Some(place) = place {
        let exporter = LogExporter::builder().with_tonic().with_channel(channel(place)).build();
        let mut exporter = exporter.map_err(failed)?;
        let resource = resource();
        exporter.set_resource(&resource);
        let (queue, task) = batch::start("logs", Lines(exporter));
        sending.push(task);
        let provider =
            SdkLoggerProvider::builder().with_resource(resource).with_log_processor(queue).build();
        // What sending has to say is not sent: it would have no end. Nor is what libraries say, who
        // are what sends, nor what `-verbose` adds: the output of a template is among it.
        let own = Targets::new()
            .with_target("envd", LevelFilter::INFO)
            .with_target("envd::telemetry", LevelFilter::OFF);
        layers.push(
            OpenTelemetryTracingBridge::new(&provider).with_filter(Limited::silent(own)).boxed(),
        );
        providers.1 = Some(provider);
    }
    if layers.is_empty() {
        return Ok(None);
    }
    Ok(Some((Exports { sending, _providers: providers }, layers)))
}

fn failed(error: impl std::error::Error) -> TelemetryError {
    TelemetryError::Export(error.to_string())
}

/// A variable that is set and not empty, as OpenTelemetry reads them.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Where one kind of telemetry goes: as the flag says, or its variable, or that of both.
fn place(
    collector: Option<&Collector>,
    exporter: &'static str,
    endpoint: &'static str,
) -> Result<Option<Collector>, TelemetryError> {
    match variable(exporter).as_deref() {
        Some("none") => return Ok(None),
        None | Some("otlp") => {}
        Some(_) => {
            let why = "is neither otlp nor none".to_owned();
            return Err(TelemetryError::Variable { name: exporter, why });
        }
    }
    if let Some(collector) = collector {
        return Ok(Some(collector.clone()));
    }
    for name in [endpoint, "OTEL_EXPORTER_OTLP_ENDPOINT"] {
        if let Some(text) = variable(name) {
            speaks_grpc()?;
            let parsed = text.parse::<Collector>();
            let wrong = |error: TelemetryError| error.to_string();
            return parsed
                .map(Some)
                .map_err(|error| TelemetryError::Variable { name, why: wrong(error) });
        }
    }
    Ok(None)
}

/// Whether what is named by the environment is to be spoken to as this daemon can.
fn speaks_grpc() -> Result<(), TelemetryError> {
    let name = "OTEL_EXPORTER_OTLP_PROTOCOL";
    match variable(name).as_deref() {
        None | Some("grpc") => Ok(()),
        Some(_) => {
            let why = "this envd speaks grpc to collectors".to_owned();
            Err(TelemetryError::Variable { name, why })
        }
    }
}

/// Connects when there is something to send.
fn channel(collector: Collector) -> Channel {
    let connect = tower::service_fn(move |_: http::Uri| {
        let address = collector.address().clone();
        async move { dial::connect(address).await.map(TokioIo::new) }
    });
    // The name is for the `authority` of its requests.
    Endpoint::from_static("http://collector")
        .connect_timeout(CONNECT_TIME)
        .connect_with_connector_lazy(connect)
}

/// Who sends this.
fn resource() -> Resource {
    let builder = Resource::builder()
        .with_attribute(opentelemetry::KeyValue::new("service.version", version::OWN));
    let named = variable("OTEL_SERVICE_NAME").is_some()
        || variable("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|list| list.contains("service.name="));
    match named {
        true => builder.build(),
        false => builder.with_service_name("envd").build(),
    }
}

struct Spans(SpanExporter);

impl Export<SpanData> for Spans {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.export(batch).await
    }
}

impl SpanProcessor for Queue<SpanData> {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() {
            self.push(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

type Line = (SdkLogRecord, InstrumentationScope);

struct Lines(LogExporter);

impl Export<Line> for Lines {
    async fn export(&self, batch: Vec<Line>) -> OTelSdkResult {
        let lines: Vec<_> = batch.iter().map(|(record, scope)| (record, scope)).collect();
        self.0.export(LogBatch::new(&lines)).await
    }
}

impl LogProcessor for Queue<Line> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        self.push((record.clone(), scope.clone()));
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}
