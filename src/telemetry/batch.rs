//! A queue that never makes anybody wait, and the task that sends what is in it.
//!
//! The batch processors of OpenTelemetry's SDK have a thread each that wakes up every few seconds
//! whether or not there is anything; a sandbox that does nothing is to wake up never.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use opentelemetry_sdk::error::OTelSdkResult;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

/// How many spans, and how many lines, wait at most (as OpenTelemetry's `OTEL_BSP_MAX_QUEUE_SIZE`).
/// What comes then is dropped and counted.
const MAX_WAITING: usize = 2048;
/// How many are sent at a time at most.
const MAX_BATCH: usize = 512;
/// How long the first of a batch waits for more.
const LINGER: Duration = Duration::from_secs(1);
/// How long a collector may take for a batch; then it is lost.
const EXPORT_TIME: Duration = Duration::from_secs(10);

const _: () = assert!(MAX_BATCH <= MAX_WAITING);

/// Where things are put in.
#[derive(Debug)]
pub(super) struct Queue<T> {
    waiting: mpsc::Sender<T>,
    dropped: Arc<AtomicU64>,
}

impl<T> Queue<T> {
    /// Puts it in, or drops it.
    pub(super) fn push(&self, item: T) {
        if self.waiting.try_send(item).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The task at the other end.
#[derive(Debug)]
pub(super) struct Sending {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Sending {
    /// Takes nothing more, and waits until what was there has been sent or the deadline.
    pub(super) async fn finish(self, deadline: Instant) {
        // It has ended by itself if nobody hears this.
        let _ = self.stop.send(());
        let mut task = self.task;
        if timeout_at(deadline, &mut task).await.is_err() {
            task.abort();
        }
    }
}

/// A queue, and the task that gives what is in it to `export`. `what` is for the log.
pub(super) fn start<T, E>(what: &'static str, export: E) -> (Queue<T>, Sending)
where
    T: Send + 'static,
    E: Export<T>,
{
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    let dropped = Arc::new(AtomicU64::new(0));
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(send(what, receiver, Arc::clone(&dropped), stopped, export));
    (Queue { waiting: sender, dropped }, Sending { stop, task })
}

/// What sends.
pub(super) trait Export<T>: Send + 'static {
    /// Sends a batch.
    fn export(&self, batch: Vec<T>) -> impl Future<Output = OTelSdkResult> + Send;
}

async fn send<T: Send, E: Export<T>>(
    what: &'static str,
    mut waiting: mpsc::Receiver<T>,
    dropped: Arc<AtomicU64>,
    mut stopped: oneshot::Receiver<()>,
    export: E,
) {
    let mut lost = 0;
    let mut stopping = false;
    loop {
        let mut batch = Vec::new();
        // While there is nothing it sleeps, without a timer.
        tokio::select! {
            count = waiting.recv_many(&mut batch, MAX_BATCH) => if count == 0 { break },
            _ = &mut stopped, if !stopping => stopping = true,
        }
        let full = Instant::now() + LINGER;
        while !stopping && batch.len() < MAX_BATCH {
            let more = MAX_BATCH - batch.len();
            tokio::select! {
                count = timeout_at(full, waiting.recv_many(&mut batch, more)) => {
                    if !matches!(count, Ok(1..)) { break }
                }
                _ = &mut stopped => stopping = true,
            }
        }
        if stopping {
            waiting.close();
        }
        if batch.is_empty() {
            continue;
        }
        let count = batch.len() as u64;
        let sent = match timeout(EXPORT_TIME, export.export(batch)).await {
            Ok(sent) => sent.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", EXPORT_TIME.as_secs())),
        };
        let full = dropped.swap(0, Ordering::Relaxed);
        match sent {
            Ok(()) if lost + full > 0 => {
                tracing::warn!(what, lost = lost + full, "telemetry was lost");
                lost = 0;
            }
            Ok(()) => {}
            Err(error) => {
                // Once for as long as it lasts: a log of one's own failures has no end.
                if lost == 0 {
                    tracing::warn!(what, error, "the collector takes no telemetry");
                }
                lost += count + full;
            }
        }
    }
    lost += dropped.load(Ordering::Relaxed);
    if lost > 0 {
        tracing::warn!(what, lost, "telemetry was lost");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc as std_mpsc;

    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Answer {
        Taken,
        Refused,
        Never,
    }

    /// Tells the sizes of the batches, and answers as it is told.
    struct Fake {
        sizes: std_mpsc::Sender<usize>,
        answer: Answer,
    }

    impl Export<u32> for Fake {
        async fn export(&self, batch: Vec<u32>) -> OTelSdkResult {
            self.sizes.send(batch.len()).unwrap();
            match self.answer {
                Answer::Taken => Ok(()),
                Answer::Refused => Err(OTelSdkError::InternalFailure("no".to_owned())),
                Answer::Never => std::future::pending().await,
            }
        }
    }

    fn fake(answer: Answer) -> (Queue<u32>, Sending, std_mpsc::Receiver<usize>) {
        let (sizes, told) = std_mpsc::channel();
        let (queue, sending) = start("things", Fake { sizes, answer });
        (queue, sending, told)
    }

    #[tokio::test]
    async fn what_waits_is_sent_at_the_end_in_batches() {
        let (queue, sending, told) = fake(Answer::Taken);
        for item in 0..u32::try_from(MAX_BATCH + 3).unwrap() {
            queue.push(item);
        }
        sending.finish(Instant::now() + EXPORT_TIME).await;
        assert_eq!(told.into_iter().collect::<Vec<_>>(), [MAX_BATCH, 3]);
        queue.push(0);
        assert_eq!(queue.dropped.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_collector_that_hangs_or_fails_costs_a_queue_and_no_time() {
        for answer in [Answer::Never, Answer::Refused] {
            let (queue, sending, _told) = fake(answer);
            for item in 0..100_000 {
                queue.push(item);
            }
            let dropped = queue.dropped.load(Ordering::Relaxed);
            assert_eq!(dropped, 100_000 - MAX_WAITING as u64);
            // It ends, although the collector never answers.
            sending.finish(Instant::now() + Duration::from_millis(10)).await;
        }
    }
}
