use proptest::prelude::*;

use super::*;
use crate::sys::pidfd::Exit;

fn ending() -> Ending {
    Ending::new(Exit::Exited(0), false)
}

/// The next event, if it is there.
async fn now(subscription: &mut Subscription) -> Option<Event> {
    tokio::select! {
        biased;
        event = subscription.next() => event,
        () = std::future::ready(()) => None,
    }
}

async fn append_now(journal: &Journal, channel: Channel, data: &Bytes) -> bool {
    tokio::select! {
        biased;
        () = journal.append(channel, data.clone()) => true,
        () = std::future::ready(()) => false,
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append { channel: Channel, len: usize },
    Subscribe,
    Take(usize),
    Drop(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let channel = prop_oneof![Just(Channel::Stdout), Just(Channel::Stderr)];
    let len = prop_oneof![1..16_usize, 1..9000_usize, Just(32 * 1024_usize)];
    prop_oneof![
        6 => (channel, len).prop_map(|(channel, len)| Step::Append { channel, len }),
        1 => Just(Step::Subscribe),
        4 => (0..8_usize).prop_map(Step::Take),
        1 => (0..8_usize).prop_map(Step::Drop),
    ]
}

/// What a reader should see, as (channel, byte) for every offset.
type Model = Vec<(Channel, u8)>;

fn check(event: &Event, model: &Model, seen: &mut usize) {
    let Event::Output { channel, data } = event else { panic!("{event:?}") };
    assert!(!data.is_empty() && data.len() <= MAX_EVENT);
    let expected = &model[*seen..*seen + data.len()];
    assert!(expected.iter().zip(data).all(|((c, b), byte)| c == channel && b == byte));
    *seen += data.len();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn every_subscriber_sees_a_gapless_sequence_from_where_it_began(
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let journal = Arc::new(Journal::new(STALL_LIMIT));
            let mut model: Model = Vec::new();
            let mut readers: Vec<(Subscription, usize)> = Vec::new();
            for step in steps {
                match step {
                    Step::Append { channel, len } => {
                        let bytes: Vec<u8> =
                            (0..len).map(|i| (model.len() + i).to_le_bytes()[0]).collect();
                        if append_now(&journal, channel, &bytes.clone().into()).await {
                            model.extend(bytes.into_iter().map(|byte| (channel, byte)));
                        } else {
                            let slowest = readers.iter().map(|(_, seen)| *seen).min();
                            assert!(slowest.is_some(), "waits for nobody");
                        }
                    }
                    Step::Subscribe => readers.push((journal.subscribe(), model.len())),
                    Step::Take(index) if index < readers.len() => {
                        let (subscription, seen) = &mut readers[index];
                        match now(subscription).await {
                            Some(event) => check(&event, &model, seen),
                            None => assert_eq!(*seen, model.len()),
                        }
                    }
                    Step::Drop(index) if index < readers.len() => drop(readers.remove(index)),
                    Step::Take(_) | Step::Drop(_) => {}
                }
                let (bytes, chunks) = journal.retained();
                assert!(bytes + chunks * CHUNK_COST <= WINDOW + MAX_EVENT);
            }
            journal.end(ending());
            // A background child goes on; nobody sees it.
            let late = append_now(&journal, Channel::Stdout, &Bytes::from_static(b"late")).await;
            assert!(late || !readers.is_empty());
            for (subscription, mut seen) in readers {
                let mut subscription = subscription;
                while seen < model.len() {
                    check(&now(&mut subscription).await.unwrap(), &model, &mut seen);
                }
                assert_eq!(now(&mut subscription).await, Some(Event::End(ending())));
                assert_eq!(subscription.next().await, None);
            }
        });
    }
}

#[tokio::test]
async fn single_bytes_of_two_channels_stay_within_the_bound() {
    let journal = Arc::new(Journal::new(STALL_LIMIT));
    for i in 0..100_000 {
        let channel = if i % 2 == 0 { Channel::Stdout } else { Channel::Stderr };
        journal.append(channel, Bytes::from_static(b"x")).await;
    }
    let (bytes, chunks) = journal.retained();
    assert!(bytes + chunks * CHUNK_COST <= WINDOW, "{bytes} in {chunks}");
    journal.end(ending());
    let (bytes, chunks) = journal.retained();
    assert!(bytes + chunks * CHUNK_COST <= LATE_WINDOW, "{bytes} in {chunks}");
}

#[tokio::test]
async fn single_bytes_of_one_channel_are_joined() {
    let journal = Arc::new(Journal::new(STALL_LIMIT));
    for _ in 0..100_000 {
        journal.append(Channel::Pty, Bytes::from_static(b"x")).await;
    }
    let (bytes, chunks) = journal.retained();
    assert_eq!(bytes, 100_000);
    assert!(chunks <= 100_000 / JOIN_LIMIT + 1, "{chunks}");
}

#[tokio::test]
async fn a_subscriber_that_takes_nothing_is_let_go_and_a_slow_one_is_not() {
    let limit = Duration::from_secs(1);
    let journal = Arc::new(Journal::new(limit));
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    let (mut dead, mut slow) = (journal.subscribe(), journal.subscribe());
    let begin = Instant::now();
    let writer = {
        let (journal, chunk) = (Arc::clone(&journal), chunk.clone());
        tokio::spawn(async move {
            for _ in 0..100 {
                journal.append(Channel::Stdout, chunk.clone()).await;
            }
            journal.end(ending());
        })
    };
    let mut total = 0;
    while let Some(event) = slow.next().await {
        match event {
            Event::Output { data, .. } => total += data.len(),
            Event::End(_) => break,
            Event::Detached => panic!("a live subscriber was let go"),
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    writer.await.unwrap();
    assert_eq!(total, 100 * chunk.len());
    assert!(begin.elapsed() >= limit);
    assert_eq!(dead.next().await, Some(Event::Detached));
    assert_eq!(dead.next().await, None);
}

#[tokio::test]
async fn a_dropped_subscriber_holds_nobody_up() {
    let journal = Arc::new(Journal::new(STALL_LIMIT));
    let subscription = journal.subscribe();
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    while append_now(&journal, Channel::Stdout, &chunk).await {}
    let blocked = {
        let journal = Arc::clone(&journal);
        tokio::spawn(async move { journal.append(Channel::Stdout, chunk).await })
    };
    tokio::task::yield_now().await;
    assert!(!blocked.is_finished());
    drop(subscription);
    blocked.await.unwrap();
}

#[tokio::test]
async fn there_is_a_bound_on_subscriptions() {
    let journal = Arc::new(Journal::new(STALL_LIMIT));
    let all: Vec<_> = (0..MAX_SUBSCRIPTIONS).map(|_| journal.subscribe()).collect();
    assert_eq!(journal.subscribe().next().await, Some(Event::Detached));
    drop(all);
    assert_eq!(now(&mut journal.subscribe()).await, None);
}
