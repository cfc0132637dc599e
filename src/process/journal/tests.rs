use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{
    process::options::{OUTPUT_WINDOW as WINDOW, STALL_LIMIT},
    sys::pidfd::Exit,
};

fn ending() -> Ending {
    Ending::new(Exit::Exited(0), false)
}

fn bounds(memory: usize) -> Bounds {
    Bounds { memory, disk: 0, block: false }
}

fn bounded(bounds: Bounds, stall_limit: Duration) -> Arc<Journal> {
    Arc::new(Journal::new(bounds, stall_limit, Pressure::new(usize::MAX), None))
}

fn journal(memory: usize) -> Arc<Journal> {
    bounded(bounds(memory), STALL_LIMIT)
}

/// Nothing is retained that could be given up.
#[derive(Debug)]
struct Nothing;

impl Relief for Nothing {
    fn relieve(&self, _: Option<i32>) -> bool {
        false
    }
}

fn disk_in(dir: std::path::PathBuf, pool: Arc<Pool>) -> Disk {
    Disk { dir: SpillDir::new(dir), pool, relief: Arc::new(Nothing) }
}

fn on_disk(memory: usize, disk: u64) -> (Arc<Journal>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let place = disk_in(dir.path().join("deep/er"), Pool::new("test", 0, 2));
    let bounds = Bounds { memory, disk, block: false };
    let journal = Journal::new(bounds, STALL_LIMIT, Pressure::new(usize::MAX), Some(place));
    (Arc::new(journal), dir)
}

fn subscribe(journal: &Arc<Journal>) -> Subscription {
    journal.subscribe(Attach::Now, true).unwrap()
}

/// The next event, if it is there.
async fn now(subscription: &mut Subscription) -> Option<Event> {
    tokio::select! {
        biased;
        event = subscription.next() => event,
        () = std::future::ready(()) => None,
    }
}

/// Appends unless that has to wait for a reader; however long the disk takes.
async fn append_now(journal: &Journal, channel: Channel, data: &Bytes) -> bool {
    let mut append = pin!(journal.append(channel, data.clone()));
    journal.fanout.forget_writers();
    loop {
        tokio::select! {
            biased;
            () = &mut append => return true,
            () = tokio::task::yield_now() => if journal.fanout.has_writers() {
                return false;
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append {
        channel: Channel,
        len: usize,
    },
    Subscribe,
    /// At this part (of 256) of what was written.
    SubscribeAt(u8),
    Take {
        reader: usize,
        max: usize,
    },
    Drop(usize),
    Shrink,
}

fn step() -> impl Strategy<Value = Step> {
    let channel = prop_oneof![Just(Channel::Stdout), Just(Channel::Stderr)];
    let len = prop_oneof![1..16_usize, 1..9000_usize, Just(32 * 1024_usize)];
    let max = prop_oneof![Just(MAX_EVENT), 1..5000_usize];
    prop_oneof![
        12 => (channel, len).prop_map(|(channel, len)| Step::Append { channel, len }),
        2 => Just(Step::Subscribe),
        2 => any::<u8>().prop_map(Step::SubscribeAt),
        8 => (0..8_usize, max).prop_map(|(reader, max)| Step::Take { reader, max }),
        2 => (0..8_usize).prop_map(Step::Drop),
        1 => Just(Step::Shrink),
    ]
}

/// What was written, as (channel, byte) for every offset.
type Model = Vec<(Channel, u8)>;

/// A reader, how far it has come, and whether it may still be told of a gap.
struct Reader {
    subscription: Subscription,
    seen: usize,
    may_gap: bool,
}

impl Reader {
    fn check(&mut self, event: &Event, model: &Model, earliest: u64) {
        match event {
            Event::Output(Piece { channel, offset, data }) => {
                assert_eq!(*offset, self.seen as u64);
                assert!(!data.is_empty() && data.len() <= MAX_EVENT);
                let expected = &model[self.seen..self.seen + data.len()];
                assert!(expected.iter().zip(data).all(|((c, b), byte)| c == channel && b == byte));
                self.seen += data.len();
            }
            Event::Gap { from, to } => {
                assert!(self.may_gap, "a second gap, or one for an attached reader");
                assert_eq!(*from, self.seen as u64);
                assert!(from < to && *to <= earliest, "{from}..{to}, and there is {earliest}");
                self.seen = usize::try_from(*to).unwrap();
            }
            other => panic!("{other:?}"),
        }
        self.may_gap = false;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_reader_sees_a_gapless_sequence_or_a_declared_gap(
        steps in prop::collection::vec(step(), 1..400),
        disk in prop_oneof![Just(0), Just(64 * 1024_u64), Just(1024 * 1024)],
    ) {
        const MEMORY: usize = 128 * 1024;
        runtime().block_on(async {
            let (journal, _dir) = on_disk(MEMORY, disk);
            let mut model: Model = Vec::new();
            let mut readers: Vec<Reader> = Vec::new();
            for step in steps {
                let (earliest, end) = journal.range();
                assert_eq!(end, model.len() as u64);
                match step {
                    Step::Append { channel, len } => {
                        let bytes: Vec<u8> =
                            (0..len).map(|i| (model.len() + i).to_le_bytes()[0]).collect();
                        if append_now(&journal, channel, &bytes.clone().into()).await {
                            model.extend(bytes.into_iter().map(|byte| (channel, byte)));
                        } else {
                            let slowest = readers.iter().map(|reader| reader.seen).min();
                            let behind = model.len() - slowest.expect("waits for nobody");
                            assert!(behind >= MEMORY / (CHUNK_COST + 1), "{behind}");
                        }
                    }
                    Step::Subscribe => readers.push(Reader {
                        subscription: subscribe(&journal),
                        seen: model.len(),
                        may_gap: false,
                    }),
                    Step::SubscribeAt(part) => {
                        let seen = model.len() * usize::from(part) / 256;
                        let at = Attach::At(seen as u64);
                        let subscription = journal.subscribe(at, true).unwrap();
                        readers.push(Reader { subscription, seen, may_gap: true });
                    }
                    Step::Take { reader, max } if reader < readers.len() => {
                        let reader = &mut readers[reader];
                        match reader.subscription.next_present(max).await {
                            Some(event) => reader.check(&event, &model, earliest),
                            None => assert_eq!(reader.seen, model.len()),
                        }
                    }
                    Step::Drop(index) if index < readers.len() => drop(readers.remove(index)),
                    Step::Shrink => journal.shrink(),
                    Step::Take { .. } | Step::Drop(_) => {}
                }
                assert!(journal.cost() <= MEMORY + MAX_EVENT, "{}", journal.cost());
            }
            let ending = ending();
            journal.end(ending.clone());
            let end = Ended { ending, offset: model.len() as u64 };
            let late = journal.subscribe(Attach::At(0), true).unwrap();
            readers.push(Reader { subscription: late, seen: 0, may_gap: true });
            for mut reader in readers {
                let (earliest, _) = journal.range();
                while reader.seen < model.len() {
                    let event = reader.subscription.next().await.unwrap();
                    reader.check(&event, &model, earliest);
                }
                assert_eq!(reader.subscription.next().await, Some(Event::End(end.clone())));
                assert_eq!(reader.subscription.next().await, None);
            }
        });
    }
}

#[tokio::test]
async fn single_bytes_of_two_channels_stay_within_the_bound() {
    let journal = journal(WINDOW);
    for i in 0..100_000 {
        let channel = if i % 2 == 0 { Channel::Stdout } else { Channel::Stderr };
        journal.append(channel, Bytes::from_static(b"x")).await;
    }
    let (earliest, end) = journal.range();
    assert_eq!(end, 100_000);
    assert!(earliest > 0 && journal.cost() <= WINDOW, "{}", journal.cost());
}

#[tokio::test]
async fn single_bytes_of_one_channel_are_joined() {
    let journal = journal(WINDOW);
    for _ in 0..100_000 {
        journal.append(Channel::Pty, Bytes::from_static(b"x")).await;
    }
    assert_eq!(journal.range(), (0, 100_000));
    assert!(journal.cost() <= 100_000 + (100_000 / JOIN_LIMIT + 1) * CHUNK_COST);
}

#[tokio::test]
async fn beyond_the_bound_of_all_journals_what_nobody_reads_goes() {
    let pressure = Pressure::new(3 * WINDOW);
    let journals: Vec<_> = (0..8)
        .map(|_| Journal::new(bounds(WINDOW), STALL_LIMIT, Arc::clone(&pressure), None))
        .collect();
    let chunk = Bytes::from(vec![7; 16 * 1024]);
    for journal in &journals {
        for _ in 0..64 {
            journal.append(Channel::Stdout, chunk.clone()).await;
        }
    }
    assert!(pressure.used() <= 3 * WINDOW + 8 * LEAN_WINDOW, "{}", pressure.used());
    assert_eq!(pressure.used(), journals.iter().map(Journal::cost).sum::<usize>());
    drop(journals);
    assert_eq!(pressure.used(), 0);
}

#[tokio::test]
async fn a_subscriber_that_takes_nothing_is_let_go_and_a_slow_one_is_not() {
    let limit = Duration::from_secs(1);
    let journal = bounded(bounds(WINDOW), limit);
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    let (mut dead, mut slow) = (subscribe(&journal), subscribe(&journal));
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
            Event::Output(piece) => total += piece.data.len(),
            Event::End(_) => break,
            other => panic!("{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    writer.await.unwrap();
    assert_eq!(total, 100 * chunk.len());
    assert!(begin.elapsed() >= limit);
    assert_eq!(dead.next().await, Some(Event::Detached));
    assert_eq!(dead.next().await, None);
    // It comes back and hears of the part that is gone.
    let mut back = journal.subscribe(Attach::At(0), true).unwrap();
    let (earliest, _) = journal.range();
    assert_eq!(back.next().await, Some(Event::Gap { from: 0, to: earliest }));
    assert!(matches!(back.next().await, Some(Event::Output(piece)) if piece.offset == earliest));
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_stops_is_let_go_only_where_others_wait() {
    let stall = Stall { shared: STALL_LIMIT, alone: STALL_LIMIT * 100 };
    let journal = Arc::new(Journal::new(bounds(WINDOW), stall, Pressure::new(usize::MAX), None));
    let mut stopped = subscribe(&journal);
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    let mut appended = 0;
    while append_now(&journal, Channel::Stdout, &chunk).await {
        appended += chunk.len();
    }
    let append = |journal: &Arc<Journal>| {
        let (journal, chunk) = (Arc::clone(journal), chunk.clone());
        tokio::spawn(async move { journal.append(Channel::Stdout, chunk).await })
    };
    let blocked = append(&journal);
    tokio::time::sleep(STALL_LIMIT * 50).await;
    assert!(!blocked.is_finished(), "it is alone");
    // It goes on, and has lost nothing.
    let mut read = 0;
    while read < appended {
        match stopped.next().await {
            Some(Event::Output(piece)) => read += piece.data.len(),
            other => panic!("{other:?}"),
        }
    }
    blocked.await.unwrap();
    // Another one waits for the process.
    while append_now(&journal, Channel::Stdout, &chunk).await {}
    let blocked = append(&journal);
    let _waits = journal.subscribe(Attach::Now, true).unwrap();
    tokio::time::sleep(STALL_LIMIT * 2).await;
    assert!(blocked.is_finished(), "the other one does not wait for ever");
    while let Some(event) = stopped.next().await {
        if matches!(event, Event::Detached) {
            return;
        }
    }
    panic!("it has been let go, and was not told");
}

#[tokio::test]
async fn a_dropped_subscriber_holds_nobody_up() {
    let journal = journal(WINDOW);
    let subscription = subscribe(&journal);
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
async fn a_process_that_asks_for_it_waits_for_a_reader_until_it_has_exited() {
    let bounds = Bounds { block: true, ..bounds(64 * 1024) };
    let journal = bounded(bounds, STALL_LIMIT);
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    let fill = async || {
        let mut appended = 0;
        while append_now(&journal, Channel::Stdout, &chunk).await {
            appended += 1;
        }
        appended
    };
    assert_eq!(fill().await, 1);
    assert_eq!(fill().await, 0, "nobody has read");
    let mut reader = journal.subscribe(Attach::At(0), true).unwrap();
    assert!(matches!(now(&mut reader).await, Some(Event::Output(_))));
    drop(reader);
    assert_eq!(fill().await, 1, "as much as was read");
    journal.exited();
    for _ in 0..10 {
        assert!(append_now(&journal, Channel::Stdout, &chunk).await);
    }
}

#[tokio::test]
async fn nobody_can_read_from_beyond_the_end() {
    let journal = journal(WINDOW);
    journal.append(Channel::Stdout, Bytes::from_static(b"abc")).await;
    let error = journal.subscribe(Attach::At(4), true).unwrap_err();
    assert_eq!(error, Beyond { offset: 4, end: 3 });
    assert!(error.to_string().contains("offset 4"), "{error}");
}

#[tokio::test]
async fn what_background_children_write_later_can_be_read_by_offset() {
    let journal = journal(WINDOW);
    journal.append(Channel::Stdout, Bytes::from_static(b"before")).await;
    let mut early = journal.subscribe(Attach::At(0), true).unwrap();
    journal.end(ending());
    journal.append(Channel::Stdout, Bytes::from_static(b" after")).await;
    let text = async |subscription: &mut Subscription| {
        let mut text = Vec::new();
        while let Some(Event::Output(piece)) = subscription.next().await {
            text.extend_from_slice(&piece.data);
        }
        String::from_utf8(text).unwrap()
    };
    assert_eq!(text(&mut early).await, "before");
    let mut late = journal.subscribe(Attach::At(0), true).unwrap();
    assert_eq!(text(&mut late).await, "before after");
    let mut now = subscribe(&journal);
    assert_eq!(text(&mut now).await, "");
}

#[tokio::test]
async fn what_is_put_on_disk_is_read_back_to_the_byte_and_leaves_no_file() {
    let (journal, dir) = on_disk(64 * 1024, 16 * 1024 * 1024);
    let mut model = Model::new();
    let mut state = 7_u32;
    while model.len() < 4 * 1024 * 1024 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let channel = if state & 1 << 16 == 0 { Channel::Stdout } else { Channel::Stderr };
        let len = 1 + (state >> 17) as usize % 3000;
        let bytes: Vec<u8> = (0..len).map(|i| (model.len() + i).to_le_bytes()[0]).collect();
        journal.append(channel, bytes.clone().into()).await;
        model.extend(bytes.into_iter().map(|byte| (channel, byte)));
    }
    assert!(journal.cost() <= 64 * 1024);
    assert_eq!(journal.range(), (0, model.len() as u64));
    for begin in [0, 1, 100_000, model.len() - 10] {
        let subscription = journal.subscribe(Attach::At(begin as u64), true).unwrap();
        let mut reader = Reader { subscription, seen: begin, may_gap: false };
        while reader.seen < model.len() {
            let event = reader.subscription.next_within(10_000).await.unwrap();
            reader.check(&event, &model, 0);
        }
    }
    let spill = dir.path().join("deep/er");
    let left = || std::fs::read_dir(&spill).unwrap().count();
    assert_eq!(left(), 1);
    drop(journal);
    for _ in 0..6000 {
        if left() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("what was on disk stays there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_channels_at_once_lose_nothing_on_disk() {
    for _ in 0..20 {
        let (journal, _dir) = on_disk(64 * 1024, 16 * 1024 * 1024);
        let writers = [(Channel::Stdout, 1000), (Channel::Stderr, 3000)].map(|(channel, len)| {
            let journal = Arc::clone(&journal);
            tokio::spawn(async move {
                for number in 0..200_u8 {
                    journal.append(channel, vec![number; len].into()).await;
                }
            })
        });
        for writer in writers {
            writer.await.unwrap();
        }
        journal.end(ending());
        let mut reader = journal.subscribe(Attach::At(0), true).unwrap();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(Event::Output(piece)) = reader.next().await {
            let to = if piece.channel == Channel::Stdout { &mut stdout } else { &mut stderr };
            to.extend_from_slice(&piece.data);
        }
        let all = |len| (0..200_u8).flat_map(|number| vec![number; len]).collect::<Vec<_>>();
        assert!(stdout == all(1000) && stderr == all(3000));
    }
}

#[tokio::test]
async fn a_disk_that_takes_nothing_costs_the_oldest_bytes_only() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let place = disk_in(dir.path().join("file/below"), Pool::new("test", 0, 1));
    let bounds = Bounds { memory: 64 * 1024, disk: 1024 * 1024, block: false };
    let journal = Journal::new(bounds, STALL_LIMIT, Pressure::new(usize::MAX), Some(place));
    let journal = Arc::new(journal);
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    for _ in 0..10 {
        journal.append(Channel::Stdout, chunk.clone()).await;
    }
    let mut reader = journal.subscribe(Attach::At(0), true).unwrap();
    assert!(matches!(reader.next().await, Some(Event::Gap { from: 0, .. })));
    assert!(matches!(reader.next().await, Some(Event::Output(_))));
}

#[tokio::test]
async fn there_is_a_bound_on_subscriptions() {
    let journal = journal(WINDOW);
    let all: Vec<_> = (0..MAX_READERS).map(|_| subscribe(&journal)).collect();
    assert_eq!(subscribe(&journal).next().await, Some(Event::Detached));
    drop(all);
    assert_eq!(now(&mut subscribe(&journal)).await, None);
}

#[tokio::test]
async fn what_was_on_its_way_to_a_reader_that_broke_off_is_there_when_it_comes_back() {
    let place = tempfile::tempdir().unwrap();
    for disk in [0, 4 * 1024 * 1024] {
        let bounds = Bounds { memory: 256 * 1024, disk, block: true };
        let place = disk_in(place.path().to_owned(), Pool::new("test", 1, 1));
        let pressure = Pressure::new(usize::MAX);
        let journal = Arc::new(Journal::new(bounds, STALL_LIMIT, pressure, Some(place)));
        let chunk = Bytes::from(vec![7; 16 * 1024]);
        let mut arrived = 0;
        for _ in 0..20 {
            while append_now(&journal, Channel::Stdout, &chunk).await {}
            // It is given more than it gets to see.
            let mut reader = journal.subscribe(Attach::At(arrived), true).unwrap();
            for number in 0..4 {
                let Some(Event::Output(piece)) = reader.next_within(16 * 1024).await else {
                    panic!("at {arrived} of {disk}")
                };
                if number == 0 {
                    arrived = piece.end();
                }
            }
        }
    }
}

#[tokio::test]
async fn what_was_skipped_or_only_looked_at_is_still_unread() {
    let bounds = Bounds { block: true, ..bounds(64 * 1024) };
    let journal = bounded(bounds, STALL_LIMIT);
    let chunk = Bytes::from(vec![7; 8 * 1024]);
    journal.append(Channel::Stdout, chunk.clone()).await;
    // One begins now, one looks at everything; neither has read the first chunk for good.
    let mut now = subscribe(&journal);
    let mut looker = journal.subscribe(Attach::At(0), false).unwrap();
    journal.append(Channel::Stdout, chunk.clone()).await;
    assert!(matches!(now.next().await, Some(Event::Output(_))));
    for _ in 0..2 {
        assert!(matches!(looker.next_within(8 * 1024).await, Some(Event::Output(_))));
    }
    drop((now, looker));
    while append_now(&journal, Channel::Stdout, &chunk).await {}
    let mut reader = journal.subscribe(Attach::At(0), true).unwrap();
    assert!(matches!(reader.next().await, Some(Event::Output(piece)) if piece.offset == 0));
}

#[tokio::test]
async fn a_hole_before_the_disk_stays_a_hole() {
    let (journal, _dir) = on_disk(64 * 1024, 16 * 1024 * 1024);
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    let append = async |times: usize| {
        for _ in 0..times {
            journal.append(Channel::Stdout, chunk.clone()).await;
        }
    };
    append(10).await;
    journal.shrink();
    append(20).await;
    let (earliest, end) = journal.range();
    let mut reader = journal.subscribe(Attach::At(0), true).unwrap();
    assert_eq!(reader.next().await, Some(Event::Gap { from: 0, to: earliest }));
    let mut at = earliest;
    while at < end {
        let Some(Event::Output(piece)) = reader.next().await else { panic!("at {at} of {end}") };
        assert_eq!(piece.offset, at);
        at = piece.end();
    }
    assert!(end - earliest >= 20 * 32 * 1024, "only what shrink dropped, and what was before it");
}

#[tokio::test]
async fn a_journal_on_disk_is_lean_in_memory_when_there_is_too_much_in_all() {
    let dir = tempfile::tempdir().unwrap();
    let place = disk_in(dir.path().to_owned(), Pool::new("test", 1, 1));
    let bounds = Bounds { memory: WINDOW, disk: 16 * 1024 * 1024, block: false };
    let journal = Journal::new(bounds, STALL_LIMIT, Pressure::new(0), Some(place));
    for _ in 0..100 {
        journal.append(Channel::Stdout, vec![7; 32 * 1024].into()).await;
    }
    assert!(journal.cost() <= LEAN_WINDOW, "{}", journal.cost());
    assert_eq!(journal.range(), (0, 100 * 32 * 1024));
}
