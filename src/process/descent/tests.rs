use std::{process::Command, time::Instant};

use super::*;

fn stat(pid: i32, parent: i32, session: i32) -> Stat {
    Stat {
        pid,
        started: 1,
        parent,
        session,
        state: b'S',
        user_ticks: 0,
        system_ticks: 0,
        threads: 1,
    }
}

fn found(seeds: &[i32], all: &[Stat]) -> Vec<i32> {
    let members = seeds.iter().map(|&pid| Member { pid, started: 1 }).collect();
    let mut known = Known { members, ..Known::default() };
    let mut pids: Vec<i32> = tree(&mut known, all).iter().map(|stat| stat.pid).collect();
    pids.sort_unstable();
    pids
}

#[test]
fn a_tree_is_children_and_sessions_that_began_in_it() {
    let all = [
        stat(1, 0, 1),
        stat(2, 0, 0),
        stat(10_000_010, 1, 10_000_010),
        // A child, its child in a session of its own, and an orphan of that session.
        stat(10_000_011, 10_000_010, 10_000_010),
        stat(10_000_012, 10_000_011, 10_000_012),
        stat(10_000_013, 1, 10_000_012),
        // An orphan of the first session.
        stat(10_000_014, 1, 10_000_010),
        // Strangers.
        stat(10_000_020, 1, 10_000_020),
        stat(10_000_021, 10_000_020, 10_000_020),
    ];
    let whole = [10_000_010, 10_000_011, 10_000_012, 10_000_013, 10_000_014];
    assert_eq!(found(&[10_000_010], &all), whole);
    assert_eq!(found(&[], &all), [0; 0]);
    // A pid that is another's by now is no seed.
    let reused = Member { pid: 10_000_010, started: 2 };
    assert!(tree(&mut Known::root(reused), &all).is_empty());
    // A session is known after all that were in it; its number may be another's by then.
    let sessions = HashMap::from([(10_000_012, 1)]);
    let mut known = Known { sessions: sessions.clone(), ..Known::default() };
    assert_eq!(tree(&mut known, &all).len(), 2);
    let mut known = Known { sessions, ..Known::default() };
    let leader = Stat { started: 3, ..stat(10_000_012, 1, 10_000_012) };
    let child = Stat { started: 3, ..stat(10_000_013, 10_000_012, 10_000_012) };
    assert!(tree(&mut known, &[leader, child]).is_empty());
}

#[test]
fn an_error_in_the_middle_leaves_nobody_stopped() {
    let mut child = Command::new("setsid").args(["sleep", "1000"]).spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    // Before, it is in the session of this test.
    while Stat::of(pid).unwrap().session != pid {
        thread::yield_now();
    }
    let root = Member::of(pid).unwrap();
    let mut rounds = 0;
    let list = |look: &mut dyn FnMut(&Stat)| {
        rounds += 1;
        match rounds {
            1 => all(look),
            _ => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        }
    };
    // What it ignores.
    let error =
        signal_among(Known::root(root), libc::SIGWINCH, &StopNotes::new(None), list).unwrap_err();
    let state = Stat::of(pid).unwrap().state;
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((error.raw_os_error(), rounds), (Some(libc::EMFILE), 2));
    assert_ne!(state, b'T');
}

#[test]
fn a_list_that_misses_one_is_not_the_last_while_somebody_forks() {
    let mut parent = Command::new("sleep").arg("1000").spawn().unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = |of: &std::process::Child| i32::try_from(of.id()).unwrap();
    let root = Member::of(pid(&parent)).unwrap();
    let mut rounds = 0;
    let list = |_: &mut dyn FnMut(&Stat)| {
        rounds += 1;
        // What a chain of short-lived shells does.
        Command::new("true").status()?;
        let session = pid(&parent);
        let parent = Stat { session, ..Stat::of(session).unwrap() };
        let child = Stat { parent: session, session, ..Stat::of(pid(&child)).unwrap() };
        Ok(if rounds < 4 { vec![parent] } else { vec![parent, child] })
    };
    let found =
        signal_among(Known::root(root), libc::SIGKILL, &StopNotes::new(None), list).unwrap();
    let ended = [&mut parent, &mut child].map(|process| {
        process.kill().unwrap();
        process.wait().unwrap()
    });
    assert_eq!(found.members.len(), 2, "{ended:?}");
}

#[test]
fn a_tree_that_forks_faster_than_it_is_killed_is_stopped_first() {
    let spawn = || Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = |of: &std::process::Child| i32::try_from(of.id()).unwrap();
    let mut processes = vec![spawn()];
    let session = pid(&processes[0]);
    let root = Member::of(session).unwrap();
    let mut states = Vec::new();
    // One more at each look.
    let list = |_: &mut dyn FnMut(&Stat)| {
        if let Some(last) = processes.get(1..).and_then(<[_]>::last) {
            states.push(Stat::of(pid(last)).unwrap().state);
        }
        if states.len() < KILL_ROUNDS + 4 {
            processes.push(spawn());
        }
        let stats = processes.iter().map(|process| Stat::of(pid(process)).unwrap());
        Ok(stats.map(|stat| Stat { session, ..stat }).collect())
    };
    let found = signal_among(Known::root(root), libc::SIGKILL, &StopNotes::new(None), list);
    let deadline = Instant::now() + Duration::from_secs(20);
    let ended: Vec<bool> = processes
        .iter_mut()
        .map(|process| {
            while process.try_wait().unwrap().is_none() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            let ended = process.try_wait().unwrap().is_some();
            process.kill().unwrap();
            process.wait().unwrap();
            ended
        })
        .collect();
    assert!(ended.iter().all(|ended| *ended), "{ended:?}");
    assert!(found.is_ok_and(|found| found.members.len() == processes.len()), "{ended:?}");
    // Seen by the parent right after the signal, a killed process may still be on its way out.
    assert!(states.iter().take(KILL_ROUNDS).all(|state| *state != b'T'), "{states:?}");
    let late = &states[KILL_ROUNDS..];
    assert!(late.iter().all(|state| !matches!(state, b'Z' | b'X')), "{states:?}");
}

#[test]
fn neither_the_first_process_nor_the_kernel_nor_we_are_in_any_tree() {
    let own = i32::try_from(std::process::id()).unwrap();
    let all = [stat(1, 0, 5), stat(own, 5, 5), stat(5, 1, 5), stat(6, 2, 0), stat(2, 0, 0)];
    assert_eq!(found(&[5, 1, 2, own], &all), [5]);
}
