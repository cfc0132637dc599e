//! Reading output without a stream.

use std::time::Duration;

use tonic::Status;

use super::{events, outcome, status};
use crate::{
    process::{Attach, Event, Found, journal::MAX_EVENT},
    proto::process as pb,
};

/// What a read returns when it asks for no number of bytes.
pub const DEFAULT_BYTES: u32 = 1024 * 1024;
/// The most that one read returns, in bytes of output.
pub const MAX_BYTES: u32 = 4 * 1024 * 1024;
/// The most chunks that one read returns: of output in single bytes, the bytes are the least part.
pub const MAX_CHUNKS: usize = 16 * 1024;
/// The longest wait.
pub const MAX_WAIT: Duration = Duration::from_secs(600);

const _: () = assert!(DEFAULT_BYTES <= MAX_BYTES && MAX_EVENT <= DEFAULT_BYTES as usize);

/// Answers a Read.
pub(super) async fn read(
    found: &Found,
    request: &pb::ReadRequest,
) -> Result<pb::ReadResponse, Status> {
    let wait = outcome::span("wait", request.wait)?.unwrap_or_default().min(MAX_WAIT);
    let max = match request.max_bytes {
        0 => DEFAULT_BYTES,
        max if max <= MAX_BYTES => max,
        max => {
            return Err(Status::invalid_argument(format!(
                "the field `max_bytes` is {max}, and may be {MAX_BYTES} at most"
            )));
        }
    };
    let mut answer = pb::ReadResponse::default();
    let from = request.from_offset;
    match &request.head_tail {
        None => part(found, from, u64::MAX, max, wait, &mut answer).await?,
        Some(ends) => {
            let (head, tail) = (u64::from(ends.head_bytes), u64::from(ends.tail_bytes));
            if head + tail > u64::from(max) {
                return Err(Status::invalid_argument(format!(
                    "`head_bytes` and `tail_bytes` of the field `head_tail` are {head} and {tail}: \
                     more than `max_bytes`, which is {max}"
                )));
            }
            let (_, end) = found.range();
            let tail_at =
                end.saturating_sub(tail).max(from.saturating_add(head)).min(end.max(from));
            let head_to = from.saturating_add(head).min(tail_at);
            part(found, from, head_to, max, Duration::ZERO, &mut answer).await?;
            // A gap may have taken the head, and more.
            let at = tail_at.max(answer.next_offset);
            answer.omitted_bytes = at - answer.next_offset;
            part(found, at, end.max(at), max, Duration::ZERO, &mut answer).await?;
            if let Some(ended) = found.ended()
                && answer.next_offset == found.range().1
            {
                answer.end = Some(events::end_event(ended));
            }
        }
    }
    let (earliest, _) = found.range();
    answer.earliest_offset = earliest;
    Ok(answer)
}

/// Appends what lies from `from` on and before `to` to an answer; waits while nothing does.
async fn part(
    found: &Found,
    from: u64,
    to: u64,
    max: u32,
    wait: Duration,
    answer: &mut pb::ReadResponse,
) -> Result<(), Status> {
    let subscription = found.subscribe(Attach::At(from));
    let mut subscription = subscription.map_err(|error| status::of_offset(&error))?;
    answer.next_offset = from;
    let mut left = usize::try_from(max).unwrap_or(usize::MAX);
    let mut waits = !wait.is_zero();
    while left > 0 && answer.next_offset < to && answer.chunks.len() < MAX_CHUNKS {
        let most = usize::try_from(to - answer.next_offset).unwrap_or(left).min(left);
        let mut event = subscription.next_present(most).await;
        if event.is_none() && waits {
            event = tokio::time::timeout(wait, subscription.next_within(most)).await.ok().flatten();
        }
        waits = false;
        match event {
            Some(Event::Output(piece)) => {
                left -= piece.data.len().min(left);
                answer.next_offset = piece.end();
                answer.chunks.push(events::chunk(piece));
            }
            Some(Event::Gap { from, to }) => {
                answer.next_offset = to;
                match answer.gap {
                    None => answer.gap = Some(events::gap(from, to)),
                    // Between head and tail already.
                    Some(_) => answer.omitted_bytes += to - from,
                }
                // There may be nothing behind it, and the wait was for output.
                waits = !wait.is_zero();
            }
            Some(Event::End(end)) => {
                answer.end = Some(events::end_event(end));
                break;
            }
            Some(Event::Detached) => {
                return Err(Status::resource_exhausted("too many readers of this process"));
            }
            None => break,
        }
    }
    Ok(())
}
