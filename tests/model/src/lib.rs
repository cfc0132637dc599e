//! Interleavings of the journal's fan-out, tried one after another.
//!
//! The files are envd's own; only the lock is another one, at whose every turn the scheduler of
//! `shuttle` chooses who goes on. A wake-up that is lost is found as a deadlock.
//!
//! ```sh
//! cargo test -p envd-model
//! ```

#![allow(missing_docs, unreachable_pub, dead_code, unused_imports)]

#[path = "../../../src/process/journal/core/mod.rs"]
mod journal;

mod sync {
    use shuttle::sync::MutexGuard;

    /// A lock as envd's own, which knows no poison.
    #[derive(Debug)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

    use bytes::Bytes;
    use shuttle::future::{block_on, spawn};
    use tokio::time::Instant;

    use super::journal::{Append, Attach, Bounds, CHUNK_COST, Channel, Fanout, Pressure, Taken};

    type Journal = Fanout<&'static str>;

    const CHUNK: usize = 40;
    /// Two chunks, and not three.
    const WINDOW: usize = 2 * (CHUNK + CHUNK_COST) + 10;
    const EACH: u8 = 4;
    const TIMES: usize = 3_000;

    fn journal(block: bool) -> Arc<Journal> {
        let bounds = Bounds { memory: WINDOW, disk: 0, block };
        Arc::new(Fanout::new(bounds, Pressure::new(usize::MAX)))
    }

    /// Writes numbered chunks of one channel.
    async fn write(journal: Arc<Journal>, channel: Channel, now: Instant, stall: Duration) {
        for number in 0..EACH {
            let data = Bytes::from(vec![number; CHUNK]);
            poll_fn(|cx| match journal.append(channel, &data, now, stall, Some(cx.waker())) {
                Append::Done => Poll::Ready(()),
                Append::Full(_) => Poll::Pending,
                Append::Spill(_) => panic!("there is no disk"),
            })
            .await;
        }
    }

    async fn next(journal: &Journal, id: u64) -> Taken<&'static str> {
        poll_fn(|cx| {
            journal.take(id, usize::MAX, Some(cx.waker())).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// What a reader has seen.
    struct Seen {
        at: u64,
        gaps: usize,
        stdout: Vec<u8>,
        stderr: Vec<u8>,
        last: Option<Taken<&'static str>>,
    }

    /// Reads at most this many events; checks that none is lost or doubled.
    async fn read(journal: Arc<Journal>, (id, at): (u64, u64), events: usize) -> Seen {
        let mut seen = Seen { at, gaps: 0, stdout: Vec::new(), stderr: Vec::new(), last: None };
        for _ in 0..events {
            match next(&journal, id).await {
                Taken::Output(piece) => {
                    assert_eq!(piece.offset, seen.at);
                    seen.at = piece.end();
                    match piece.channel {
                        Channel::Stdout => seen.stdout.extend_from_slice(&piece.data),
                        _ => seen.stderr.extend_from_slice(&piece.data),
                    }
                }
                Taken::Gap { from, to } => {
                    assert_eq!((from, seen.gaps), (seen.at, 0));
                    assert!(seen.stdout.is_empty() && seen.stderr.is_empty(), "a gap later on");
                    seen.gaps += 1;
                    seen.at = to;
                }
                last @ (Taken::End(_) | Taken::Detached) => {
                    seen.last = Some(last);
                    break;
                }
                Taken::OnDisk { .. } => panic!("there is no disk"),
            }
        }
        journal.detach(id);
        seen
    }

    fn all() -> Vec<u8> {
        (0..EACH).flat_map(|number| vec![number; CHUNK]).collect()
    }

    fn check(body: impl Fn(Instant) + Send + Sync + 'static) {
        let now = Instant::now();
        shuttle::check_pct(move || body(now), TIMES, 3);
    }

    #[test]
    fn whoever_is_attached_sees_everything_in_order_and_no_wake_up_is_lost() {
        check(|now| {
            let journal = journal(false);
            let whole = spawn(read(
                Arc::clone(&journal),
                journal.attach(Attach::At(0), true).unwrap(),
                usize::MAX,
            ));
            let leaver =
                spawn(read(Arc::clone(&journal), journal.attach(Attach::Now, true).unwrap(), 2));
            let late = {
                let journal = Arc::clone(&journal);
                spawn(async move {
                    let place = journal.attach(Attach::At(0), true).unwrap();
                    read(journal, place, usize::MAX).await
                })
            };
            let stall = Duration::from_secs(1);
            let writers = [Channel::Stdout, Channel::Stderr]
                .map(|channel| spawn(write(Arc::clone(&journal), channel, now, stall)));
            block_on(async {
                for writer in writers {
                    writer.await.unwrap();
                }
                let end = journal.end("the end");
                assert_eq!(end, 2 * u64::from(EACH) * CHUNK as u64);
                let whole = whole.await.unwrap();
                assert_eq!((whole.at, whole.gaps), (end, 0));
                assert_eq!(whole.last, Some(Taken::End("the end")));
                assert!(whole.stdout == all() && whole.stderr == all());
                assert_eq!(leaver.await.unwrap().gaps, 0);
                // Whoever came later was told of what was gone, and missed nothing after it.
                let late = late.await.unwrap();
                assert_eq!((late.at, late.last), (end, Some(Taken::End("the end"))));
                assert!(all().ends_with(&late.stdout) && all().ends_with(&late.stderr));
            });
        });
    }

    #[test]
    fn whoever_takes_nothing_is_let_go_and_holds_nobody_up() {
        check(|now| {
            let journal = journal(false);
            let (dead, _) = journal.attach(Attach::Now, true).unwrap();
            let place = journal.attach(Attach::Now, true).unwrap();
            let live = spawn(read(Arc::clone(&journal), place, usize::MAX));
            // No time at all: whoever is behind when there is no room has to go.
            let writer = spawn(write(Arc::clone(&journal), Channel::Stdout, now, Duration::ZERO));
            block_on(async {
                writer.await.unwrap();
                journal.end("the end");
                let live = live.await.unwrap();
                match live.last {
                    Some(Taken::Detached) => assert!(all().starts_with(&live.stdout)),
                    last => assert_eq!((last, live.stdout), (Some(Taken::End("the end")), all())),
                }
                assert_eq!(next(&journal, dead).await, Taken::Detached);
            });
        });
    }

    #[test]
    fn a_journal_that_waits_for_readers_loses_nothing_between_two_of_them() {
        check(|now| {
            let journal = journal(true);
            let stall = Duration::from_secs(1);
            let writer = spawn(write(Arc::clone(&journal), Channel::Stdout, now, stall));
            let ender = {
                let journal = Arc::clone(&journal);
                spawn(async move {
                    writer.await.unwrap();
                    journal.end("the end");
                })
            };
            block_on(async {
                let (mut at, mut all_seen) = (0, Vec::new());
                loop {
                    let place = journal.attach(Attach::At(at), true).unwrap();
                    let seen = read(Arc::clone(&journal), place, 1).await;
                    assert_eq!(seen.gaps, 0);
                    at = seen.at;
                    all_seen.extend_from_slice(&seen.stdout);
                    if seen.last.is_some() {
                        break;
                    }
                }
                assert!(all_seen == all());
                ender.await.unwrap();
            });
        });
    }
}
