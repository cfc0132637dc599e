//! The suite's service, as the comments of its `service.proto` ask for it.

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use envd::wire::metadata::ResponseMetadata;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderName, HeaderValue};
use prost::Message;
use tonic::{Code, Extensions, Request, Response, Status, Streaming, metadata::MetadataMap};

use crate::{
    any::Any,
    proto::{
        self, BidiStreamRequest, BidiStreamResponse, ClientStreamRequest, ClientStreamResponse,
        ConformancePayload, Header, IdempotentUnaryRequest, IdempotentUnaryResponse,
        ServerStreamRequest, ServerStreamResponse, StreamResponseDefinition, UnaryRequest,
        UnaryResponse, UnaryResponseDefinition, UnimplementedRequest, UnimplementedResponse,
        conformance_payload::RequestInfo, conformance_service_server::ConformanceService,
        unary_response_definition,
    },
};

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// `google.rpc.Status`, which carries details.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// The service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conformance;

/// Sets the asked-for headers and trailers.
fn set(extensions: &Extensions, headers: &[Header], trailers: &[Header]) {
    let Some(metadata) = extensions.get::<ResponseMetadata>() else {
        return;
    };
    let each = |list: &[Header], append: &dyn Fn(HeaderName, HeaderValue)| {
        for header in list {
            for value in &header.value {
                if let (Ok(name), Ok(value)) =
                    (HeaderName::try_from(&header.name), HeaderValue::try_from(value))
                {
                    append(name, value);
                }
            }
        }
    };
    each(headers, &|name, value| metadata.append_header(name, value));
    each(trailers, &|name, value| metadata.append_trailer(name, value));
}

fn info(metadata: &MetadataMap, requests: Vec<Any>) -> RequestInfo {
    let headers = metadata.clone().into_headers();
    let request_headers = headers.keys().map(|name| Header {
        name: name.to_string(),
        value: headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .collect(),
    });
    let timeout = envd::wire::timeout::connect(&headers)
        .ok()
        .flatten()
        .or_else(|| envd::wire::timeout::grpc(&headers).ok().flatten());
    RequestInfo {
        request_headers: request_headers.collect(),
        timeout_ms: timeout.and_then(|timeout| i64::try_from(timeout.as_millis()).ok()),
        requests,
        connect_get_info: None,
    }
}

fn failure(error: &proto::Error, info: Option<RequestInfo>) -> Status {
    let mut details = error.details.clone();
    details.extend(info.map(|info| Any::pack("ConformancePayload.RequestInfo", &info)));
    let message = error.message.clone().unwrap_or_default();
    let status = RpcStatus { code: error.code, message: message.clone(), details };
    let details = Bytes::from(status.encode_to_vec());
    Status::with_details(Code::from_i32(error.code), message, details)
}

async fn pause(milliseconds: u32) {
    tokio::time::sleep(Duration::from_millis(milliseconds.into())).await;
}

async fn unary(
    definition: Option<UnaryResponseDefinition>,
    extensions: &Extensions,
    info: RequestInfo,
) -> Result<ConformancePayload, Status> {
    let definition = definition.unwrap_or_default();
    set(extensions, &definition.response_headers, &definition.response_trailers);
    pause(definition.response_delay_ms).await;
    let data = match definition.response {
        Some(unary_response_definition::Response::Error(error)) => {
            return Err(failure(&error, Some(info)));
        }
        Some(unary_response_definition::Response::ResponseData(data)) => data,
        None => Vec::new(),
    };
    Ok(ConformancePayload { data, request_info: Some(info) })
}

/// The payloads of a stream whose requests are all known, then its error.
fn streamed(
    definition: StreamResponseDefinition,
    info: RequestInfo,
) -> impl Stream<Item = Result<ConformancePayload, Status>> {
    let StreamResponseDefinition { response_data, response_delay_ms, error, .. } = definition;
    let mut info = Some(info);
    let last = error.map(|error| {
        let info = if response_data.is_empty() { info.take() } else { None };
        Err(failure(&error, info))
    });
    stream::iter(response_data)
        .then(move |data| {
            let request_info = info.take();
            async move {
                pause(response_delay_ms).await;
                Ok(ConformancePayload { data, request_info })
            }
        })
        .chain(stream::iter(last))
}

/// The payloads of a full-duplex stream: one for each request.
fn duplex(
    first: BidiStreamRequest,
    rest: Streaming<BidiStreamRequest>,
    metadata: MetadataMap,
) -> impl Stream<Item = Result<ConformancePayload, Status>> {
    struct State {
        next: Option<BidiStreamRequest>,
        rest: Streaming<BidiStreamRequest>,
        data: std::vec::IntoIter<Vec<u8>>,
        error: Option<proto::Error>,
        delay: u32,
        metadata: Option<MetadataMap>,
        done: bool,
    }
    let definition = first.response_definition.clone().unwrap_or_default();
    let state = State {
        next: Some(first),
        rest,
        data: definition.response_data.into_iter(),
        error: definition.error,
        delay: definition.response_delay_ms,
        metadata: Some(metadata),
        done: false,
    };
    stream::unfold(state, |mut state| async move {
        if state.done {
            return None;
        }
        let request = match state.next.take() {
            Some(request) => Some(request),
            None => match state.rest.message().await {
                Ok(request) => request,
                Err(status) => {
                    state.done = true;
                    return Some((Err(status), state));
                }
            },
        };
        let requests: Vec<Any> =
            request.iter().map(|r| Any::pack("BidiStreamRequest", r)).collect();
        let request_info = match (state.metadata.take(), &request) {
            (Some(metadata), _) => Some(info(&metadata, requests)),
            (None, Some(_)) => Some(RequestInfo { requests, ..RequestInfo::default() }),
            (None, None) => None,
        };
        if let Some(data) = state.data.next() {
            pause(state.delay).await;
            return Some((Ok(ConformancePayload { data, request_info }), state));
        }
        state.done = true;
        let error = state.error.take()?;
        Some((Err(failure(&error, request_info)), state))
    })
}

#[tonic::async_trait]
impl ConformanceService for Conformance {
    async fn unary(
        &self,
        request: Request<UnaryRequest>,
    ) -> Result<Response<UnaryResponse>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let info = info(&metadata, vec![Any::pack("UnaryRequest", &message)]);
        let payload = unary(message.response_definition, &extensions, info).await?;
        Ok(Response::new(UnaryResponse { payload: Some(payload) }))
    }

    async fn idempotent_unary(
        &self,
        request: Request<IdempotentUnaryRequest>,
    ) -> Result<Response<IdempotentUnaryResponse>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let info = info(&metadata, vec![Any::pack("IdempotentUnaryRequest", &message)]);
        let payload = unary(message.response_definition, &extensions, info).await?;
        Ok(Response::new(IdempotentUnaryResponse { payload: Some(payload) }))
    }

    async fn unimplemented(
        &self,
        _: Request<UnimplementedRequest>,
    ) -> Result<Response<UnimplementedResponse>, Status> {
        Err(Status::unimplemented("not implemented, as the suite asks"))
    }

    type ServerStreamStream = BoxStream<ServerStreamResponse>;

    async fn server_stream(
        &self,
        request: Request<ServerStreamRequest>,
    ) -> Result<Response<Self::ServerStreamStream>, Status> {
        let (metadata, extensions, message) = request.into_parts();
        let info = info(&metadata, vec![Any::pack("ServerStreamRequest", &message)]);
        let definition = message.response_definition.unwrap_or_default();
        set(&extensions, &definition.response_headers, &definition.response_trailers);
        let payloads = streamed(definition, info);
        let responses = payloads.map(|p| p.map(|p| ServerStreamResponse { payload: Some(p) }));
        Ok(Response::new(Box::pin(responses)))
    }

    async fn client_stream(
        &self,
        request: Request<Streaming<ClientStreamRequest>>,
    ) -> Result<Response<ClientStreamResponse>, Status> {
        let (metadata, extensions, mut messages) = request.into_parts();
        let (mut definition, mut requests) = (None, Vec::new());
        while let Some(message) = messages.message().await? {
            if requests.is_empty() {
                definition.clone_from(&message.response_definition);
            }
            requests.push(Any::pack("ClientStreamRequest", &message));
        }
        let payload = unary(definition, &extensions, info(&metadata, requests)).await?;
        Ok(Response::new(ClientStreamResponse { payload: Some(payload) }))
    }

    type BidiStreamStream = BoxStream<BidiStreamResponse>;

    async fn bidi_stream(
        &self,
        request: Request<Streaming<BidiStreamRequest>>,
    ) -> Result<Response<Self::BidiStreamStream>, Status> {
        let (metadata, extensions, mut messages) = request.into_parts();
        let Some(first) = messages.message().await? else {
            return Ok(Response::new(Box::pin(stream::empty())));
        };
        let definition = first.response_definition.clone().unwrap_or_default();
        set(&extensions, &definition.response_headers, &definition.response_trailers);
        let wrap = |payload: Result<ConformancePayload, Status>| {
            payload.map(|payload| BidiStreamResponse { payload: Some(payload) })
        };
        if first.full_duplex {
            return Ok(Response::new(Box::pin(duplex(first, messages, metadata).map(wrap))));
        }
        let mut requests = vec![Any::pack("BidiStreamRequest", &first)];
        while let Some(message) = messages.message().await? {
            requests.push(Any::pack("BidiStreamRequest", &message));
        }
        let payloads = streamed(definition, info(&metadata, requests));
        Ok(Response::new(Box::pin(payloads.map(wrap))))
    }
}
