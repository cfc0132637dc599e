//! The service `grpc.health.v1.Health`: what `/health` says, for gRPC's probes.
//!
//! | service | SERVING when |
//! |---|---|
//! | `""` | `/health` is 204 |
//! | `envd.v1.Template` | the template is ready, whatever `/health` is made to tell |
//! | every other service of this daemon | it can be called, which is always |

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_server::Health,
};

use crate::{
    proto,
    sandbox::Sandbox,
    template::{self, State},
};

/// The service.
#[derive(Debug)]
pub struct Probe {
    sandbox: Arc<Sandbox>,
}

impl Probe {
    /// Tells of a sandbox's health.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }
}

fn status(sandbox: &Sandbox, service: &str) -> ServingStatus {
    let serving = match service {
        "" => sandbox.template.is_healthy(),
        proto::TEMPLATE => sandbox.template.status().state == State::Ready,
        proto::PROCESS | proto::FILESYSTEM | proto::SYSTEM => true,
        _ => return ServingStatus::ServiceUnknown,
    };
    if serving { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

type Answers = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Health for Probe {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        match status(&self.sandbox, &service) {
            ServingStatus::ServiceUnknown => Err(Status::not_found("service not registered")),
            status => Ok(Response::new(response(status))),
        }
    }

    type WatchStream = Answers;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Answers>, Status> {
        let watching = Watching {
            service: request.into_inner().service,
            changes: self.sandbox.template.changes(),
            sandbox: Arc::clone(&self.sandbox),
            last: None,
        };
        let answers = futures_util::stream::unfold(watching, |mut watching| async {
            let status = watching.next().await?;
            Some((Ok(response(status)), watching))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

struct Watching {
    sandbox: Arc<Sandbox>,
    service: String,
    changes: watch::Receiver<template::Status>,
    last: Option<ServingStatus>,
}

impl Watching {
    /// The next status that is another one.
    async fn next(&mut self) -> Option<ServingStatus> {
        loop {
            // Marked as seen before it is looked at, so that no change falls between.
            self.changes.borrow_and_update();
            let status = status(&self.sandbox, &self.service);
            if self.last.replace(status) != Some(status) {
                return Some(status);
            }
            self.changes.changed().await.ok()?;
        }
    }
}
