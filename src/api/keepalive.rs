//! Signs of life in a silent stream.
//!
//! `Keepalive-Ping-Interval` says after how many seconds without an event the client wants one.
//! Upstream panics at zero and below (its daemon dies of it); here such values mean one second.

use std::time::Duration;

use futures_util::Stream;
use tonic::metadata::MetadataMap;

/// The interval of clients that ask for none.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(90);
/// The longest interval: a day. Longer ones only overflow clocks.
pub const MAX_INTERVAL: Duration = Duration::from_secs(86_400);

/// The interval that a call asks for.
pub fn interval(metadata: &MetadataMap) -> Duration {
    let text = metadata.get("keepalive-ping-interval").and_then(|value| value.to_str().ok());
    // Go's parser takes a sign; so many digits that i64 overflows are no integer to it either.
    let seconds = text.and_then(|text| text.trim().parse::<i64>().ok());
    seconds.map_or(DEFAULT_INTERVAL, |seconds| {
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(1)).min(MAX_INTERVAL)
    })
}

/// What a stream is made from: a source of events, and the messages that they become.
pub(super) trait Source: Send + 'static {
    /// A message of the stream.
    type Message: Send;

    /// The next message and whether it is the last; `None` when there is no more.
    fn next(&mut self) -> impl Future<Output = Option<Step<Self::Message>>> + Send;

    /// A sign of life.
    fn keepalive(&self) -> Self::Message;
}

/// One step of a stream.
pub(super) enum Step<M> {
    /// A message, and more to come.
    Message(M),
    /// The last message.
    Last(M),
    /// The end with an error.
    Error(tonic::Status),
}

/// The stream: `first`, then what the source gives, and a sign of life after each `interval`
/// without a message.
pub(super) fn stream<S: Source>(
    first: S::Message,
    source: S,
    interval: Duration,
) -> impl Stream<Item = Result<S::Message, tonic::Status>> + Send {
    enum State<S: Source> {
        First(S::Message, S),
        Following(S),
        Ended,
    }
    futures_util::stream::unfold(State::First(first, source), move |state| async move {
        let mut source = match state {
            State::First(first, source) => return Some((Ok(first), State::Following(source))),
            State::Following(source) => source,
            State::Ended => return None,
        };
        match tokio::time::timeout(interval, source.next()).await {
            Err(_) => {
                let sign = source.keepalive();
                Some((Ok(sign), State::Following(source)))
            }
            Ok(Some(Step::Message(message))) => Some((Ok(message), State::Following(source))),
            Ok(Some(Step::Last(message))) => Some((Ok(message), State::Ended)),
            Ok(Some(Step::Error(status))) => Some((Err(status), State::Ended)),
            Ok(None) => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_of_the_header_is_dangerous() {
        let of = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("keepalive-ping-interval", value.parse().unwrap());
            interval(&metadata).as_secs()
        };
        assert_eq!(interval(&MetadataMap::new()), DEFAULT_INTERVAL);
        for (value, seconds) in [
            ("50", 50),
            (" 1 ", 1),
            ("+7", 7),
            ("0", 1),
            ("-1", 1),
            ("9223372037", 86_400),
            ("99999999999999999999", 90),
            ("1.0", 90),
            ("abc", 90),
            ("", 90),
        ] {
            assert_eq!(of(value), seconds, "{value:?}");
        }
    }
}
