//! Waiting for a process.

use std::{collections::VecDeque, time::Duration};

use bytes::BytesMut;
use regex::bytes::{Regex, RegexBuilder};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::Status;

use super::{events, outcome, status};
use crate::{
    process::{
        Attach, Event, Found, Manager, Subscription,
        journal::{Channel, Ended, MAX_EVENT, Piece},
        ports,
    },
    proto::process::{
        self as pb,
        wait_request::{self, Condition},
        wait_response::{self, Result as Answer},
    },
};

/// The longest regular expression, in bytes.
pub const MAX_REGEX: usize = 4096;
/// The most memory that a compiled one may take, and its cache again, in bytes.
pub const MAX_REGEX_MEMORY: usize = 1024 * 1024;
/// How much output before the newest piece a match may reach back.
pub const MATCH_REACH: usize = 16 * 1024;
/// The least time of silence.
pub const MIN_SILENCE: Duration = Duration::from_millis(10);
/// The pauses between looks at the sockets that listen: the kernel tells nobody of a new one. They
/// double from the first to the second.
pub const PORT_PAUSES: (Duration, Duration) =
    (Duration::from_millis(20), Duration::from_millis(500));

/// Answers a Wait.
pub(super) async fn wait(
    processes: &Manager,
    found: &Found,
    request: pb::WaitRequest,
) -> Result<pb::WaitResponse, Status> {
    let limit = outcome::span("timeout", request.timeout)?;
    let waiting = async {
        Ok::<_, Status>(match request.condition {
            None => end_of(subscribe(found, Attach::Now)?).await?,
            Some(Condition::Output(output)) => matches(processes, found, output).await?,
            Some(Condition::Port(port)) => listens(found, port.number).await?,
            Some(Condition::Silence(silence)) => silent(found, &silence).await?,
        })
    };
    let answer = match limit {
        None => waiting.await?,
        Some(limit) => match timeout(limit, waiting).await {
            Ok(answer) => answer?,
            Err(_) => Answer::TimedOut(outcome::duration(limit)),
        },
    };
    let (_, next_offset) = found.range();
    Ok(pb::WaitResponse { result: Some(answer), next_offset })
}

fn subscribe(found: &Found, at: Attach) -> Result<Subscription, Status> {
    found.look_on(at).map_err(|error| status::of_offset(&error))
}

fn ended(end: Ended) -> Answer {
    Answer::End(events::end_event(end))
}

fn detached() -> Status {
    Status::resource_exhausted("too many readers of this process")
}

async fn end_of(mut output: Subscription) -> Result<Answer, Status> {
    loop {
        match output.next().await {
            Some(Event::End(end)) => return Ok(ended(end)),
            Some(Event::Output(_) | Event::Gap { .. }) => {}
            Some(Event::Detached) | None => return Err(detached()),
        }
    }
}

async fn matches(
    processes: &Manager,
    found: &Found,
    output: wait_request::Output,
) -> Result<Answer, Status> {
    let regex = compile(&output.regex)?;
    let (earliest, _) = found.range();
    let from = match output.from_offset {
        0 => earliest,
        offset => offset,
    };
    let mut subscription = subscribe(found, Attach::At(from))?;
    let mut channels = [(); 3].map(|()| Haystack::default());
    loop {
        match subscription.next().await {
            Some(Event::Output(piece)) => {
                let stderr = piece.channel == Channel::Stderr;
                if output.stderr.is_some_and(|wanted| wanted != stderr) {
                    continue;
                }
                let index = match piece.channel {
                    Channel::Stdout => 0,
                    Channel::Stderr => 1,
                    Channel::Pty => 2,
                };
                let Some(place) = channels.get_mut(index) else { continue };
                let (mut haystack, regex) = (std::mem::take(place), regex.clone());
                let search = processes.search(move || {
                    let hit = haystack.find(&regex, &piece);
                    (haystack, hit)
                });
                let (haystack, hit) =
                    search.await.map_err(|error| Status::resource_exhausted(error.to_string()))?;
                *place = haystack;
                if let Some((offset, bytes)) = hit {
                    return Ok(Answer::Match(wait_response::Match { offset, bytes, stderr }));
                }
            }
            // What comes next is not adjacent to what was.
            Some(Event::Gap { .. }) => channels = [(); 3].map(|()| Haystack::default()),
            Some(Event::End(end)) => return Ok(ended(end)),
            Some(Event::Detached) | None => return Err(detached()),
        }
    }
}

fn compile(regex: &str) -> Result<Regex, Status> {
    let wrong = |why: String| Status::invalid_argument(format!("the field `output.regex`: {why}"));
    if regex.len() > MAX_REGEX {
        return Err(wrong(format!("{} bytes, and {MAX_REGEX} at most", regex.len())));
    }
    RegexBuilder::new(regex)
        .size_limit(MAX_REGEX_MEMORY)
        .dfa_size_limit(MAX_REGEX_MEMORY)
        .build()
        .map_err(|error| wrong(error.to_string()))
}

/// The newest output of one channel.
#[derive(Default)]
struct Haystack {
    bytes: BytesMut,
    /// Where parts of it begin: in `bytes`, and in the output.
    parts: VecDeque<(usize, u64)>,
}

impl Haystack {
    /// Appends a piece and looks for a match, which may begin up to [`MATCH_REACH`] before it.
    fn find(&mut self, regex: &Regex, piece: &Piece) -> Option<(u64, bytes::Bytes)> {
        let surplus = self.bytes.len().saturating_sub(MATCH_REACH);
        if surplus > 0 {
            let _ = self.bytes.split_to(surplus);
            while let Some(&(_, offset)) = self.parts.front() {
                match self.parts.get(1) {
                    Some(&(next, _)) if next <= surplus => {
                        self.parts.pop_front();
                    }
                    _ => {
                        if let Some(first) = self.parts.front_mut() {
                            *first = (0, offset + (surplus - first.0) as u64);
                        }
                        break;
                    }
                }
            }
            for part in self.parts.iter_mut().skip(1) {
                part.0 -= surplus;
            }
        }
        self.parts.push_back((self.bytes.len(), piece.offset));
        self.bytes.extend_from_slice(&piece.data);
        let found = regex.find(&self.bytes)?;
        let part = self.parts.partition_point(|(begin, _)| *begin <= found.start());
        let (begin, offset) = self.parts.get(part.checked_sub(1)?)?;
        let offset = offset + (found.start() - begin) as u64;
        let end = found.end().min(found.start() + MAX_EVENT);
        Some((offset, self.bytes.get(found.start()..end)?.to_vec().into()))
    }
}

async fn listens(found: &Found, port: u32) -> Result<Answer, Status> {
    let port = u16::try_from(port).map_err(|_| {
        Status::invalid_argument(format!("the field `port.number` is {port}, which is no port"))
    })?;
    let end = end_of(subscribe(found, Attach::Now)?);
    tokio::pin!(end);
    let (mut pause, longest) = PORT_PAUSES;
    loop {
        if let Found::Live(process) = found {
            let looked = process.listening(port).await;
            if let Some(ports::Listening { port, address }) = looked {
                let address = address.to_string();
                let port = u32::from(port);
                return Ok(Answer::Listening(wait_response::Listening { port, address }));
            }
        }
        tokio::select! {
            end = &mut end => return end,
            () = sleep(pause) => pause = (pause * 2).min(longest),
        }
    }
}

async fn silent(found: &Found, silence: &wait_request::Silence) -> Result<Answer, Status> {
    let field = "silence.duration";
    let wanted = outcome::span(field, silence.duration)?.unwrap_or_default();
    if wanted < MIN_SILENCE {
        return Err(Status::invalid_argument(format!(
            "the field `{field}` is {wanted:?}, and must be {MIN_SILENCE:?} at least"
        )));
    }
    let begun = Instant::now();
    let mut output = subscribe(found, Attach::Now)?;
    loop {
        // What was silent before this call was silent all the same.
        let since = found.last_output().unwrap_or(begun);
        let until = since.checked_add(wanted).ok_or_else(|| {
            Status::invalid_argument(format!("the field `{field}` is beyond all clocks"))
        })?;
        tokio::select! {
            biased;
            event = output.next() => match event {
                Some(Event::End(end)) => return Ok(ended(end)),
                Some(Event::Output(_) | Event::Gap { .. }) => {}
                Some(Event::Detached) | None => return Err(detached()),
            },
            () = sleep_until(until) => return Ok(Answer::Silent(outcome::duration(wanted))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, data: &[u8]) -> Piece {
        Piece { channel: Channel::Stdout, offset, data: data.to_vec().into() }
    }

    #[test]
    fn a_match_across_pieces_has_the_offset_of_its_first_byte() {
        let regex = compile("rea+dy").unwrap();
        let mut haystack = Haystack::default();
        assert_eq!(haystack.find(&regex, &piece(10, b"not yet\nre")), None);
        // Another channel wrote in between.
        assert_eq!(haystack.find(&regex, &piece(100, b"aa")), None);
        let (offset, bytes) = haystack.find(&regex, &piece(200, b"dy\n")).unwrap();
        assert_eq!((offset, &bytes[..]), (18, &b"reaady"[..]));
    }

    #[test]
    fn a_match_after_much_output_has_the_right_offset_too() {
        let regex = compile("needle").unwrap();
        let mut haystack = Haystack::default();
        let mut offset = 0;
        for len in [1, MATCH_REACH - 1, 70, MATCH_REACH, 3, 5000, 2] {
            assert_eq!(haystack.find(&regex, &piece(offset, &vec![b'x'; len])), None);
            offset += len as u64;
        }
        let found = haystack.find(&regex, &piece(offset, b"xxneedle")).unwrap();
        assert_eq!((found.0, &found.1[..]), (offset + 2, &b"needle"[..]));
        assert!(haystack.bytes.len() <= MATCH_REACH + 8);
    }

    #[test]
    fn bad_expressions_name_the_field() {
        for regex in ["(", &"x".repeat(MAX_REGEX + 1), "(a{1000}){1000}"] {
            let error = compile(regex).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.message().contains("output.regex"), "{error}");
        }
    }
}
