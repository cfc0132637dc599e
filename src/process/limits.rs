//! What a caller may limit, checked, with the kernel's names and numbers.

use std::time::Duration;

use crate::sys::spawn::Rlimit;

/// The least limit of memory: below it not even a shell starts, and says so in odd ways.
pub const MIN_MEMORY: u64 = 1 << 20;
/// The least processor time, in thousandths of a processor: the kernel's own limit is 1 ms in each
/// 100 ms.
pub const MIN_CPU_MILLIS: u64 = 10;
/// The most processor time, in thousandths of a processor; no machine has more.
pub const MAX_CPU_MILLIS: u64 = 100_000_000;
/// The most processes that a limit can speak of (`PID_MAX_LIMIT` of the kernel).
pub const MAX_PIDS: u64 = 4 << 20;
/// The time between SIGTERM and SIGKILL where the caller says nothing.
pub const DEFAULT_KILL_GRACE: Duration = Duration::from_secs(5);
/// The longest time between SIGTERM and SIGKILL.
pub const MAX_KILL_GRACE: Duration = Duration::from_secs(3600);

/// The period of `cpu.max` in microseconds, the kernel's default.
const CPU_PERIOD: u64 = 100_000;

/// The names of setrlimit(2) at the places of their numbers. x86-64, arm64 and riscv64 share them.
const RLIMITS: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// The place of `nofile` among the limits.
pub(super) const NOFILE: u32 = 7;

const _: () = assert!(matches!(RLIMITS[NOFILE as usize].as_bytes(), b"nofile"));

/// A limit that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the field `{field}` {why}")]
pub struct LimitError {
    /// The field, as the caller writes it.
    pub field: String,
    /// What is wrong.
    pub why: String,
}

/// Limits of a process and all that descends from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, without swap.
    memory: Option<u64>,
    /// Processes and threads.
    pids: Option<u64>,
    /// Thousandths of a processor.
    cpu_millis: Option<u64>,
    /// Those of setrlimit(2), each once.
    rlimits: Vec<Rlimit>,
}

/// How long a process may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimit {
    /// Then its tree gets SIGTERM.
    pub timeout: Duration,
    /// And so much later SIGKILL.
    pub grace: Duration,
}

impl Limits {
    /// Limits of the whole tree.
    ///
    /// # Errors
    /// One is out of its range.
    pub fn new(
        memory: Option<u64>,
        pids: Option<u64>,
        cpu_millis: Option<u64>,
    ) -> Result<Self, LimitError> {
        within("limits.memory_bytes", memory, MIN_MEMORY, i64::MAX.unsigned_abs())?;
        within("limits.pids", pids, 1, MAX_PIDS)?;
        within("limits.cpu_millis", cpu_millis, MIN_CPU_MILLIS, MAX_CPU_MILLIS)?;
        Ok(Self { memory, pids, cpu_millis, rlimits: Vec::new() })
    }

    /// Adds a limit of setrlimit(2), by its name with or without `RLIMIT_`, in any case. Without a
    /// hard limit it is unlimited; without a soft one that is the hard one.
    ///
    /// # Errors
    /// There is no such limit, it is there already, or the soft one is above the hard one.
    pub fn add_rlimit(
        &mut self,
        name: &str,
        soft: Option<u64>,
        hard: Option<u64>,
    ) -> Result<(), LimitError> {
        let field = format!("limits.rlimits[{}]", self.rlimits.len());
        let error = |why: String| Err(LimitError { field: field.clone(), why });
        let lower = name.to_ascii_lowercase();
        let short = lower.strip_prefix("rlimit_").unwrap_or(&lower);
        let known = RLIMITS.iter().zip(0..).find(|(known, _)| **known == short);
        let Some((short, resource)) = known else {
            let name = crate::quote::text(name);
            return error(format!("names no limit: '{name}' (there are {})", RLIMITS.join(", ")));
        };
        if self.rlimits.iter().any(|limit| limit.resource == resource) {
            return error(format!("limits {short} a second time"));
        }
        let hard = hard.unwrap_or(libc::RLIM_INFINITY);
        let soft = soft.unwrap_or(hard);
        if soft > hard {
            return error(format!(
                "has a soft limit of {short} above the hard one: {soft} > {hard}"
            ));
        }
        self.rlimits.push(Rlimit { resource, soft, hard });
        Ok(())
    }

    /// Bytes of memory.
    pub fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// Processes and threads.
    pub fn pids(&self) -> Option<u64> {
        self.pids
    }

    /// Those of setrlimit(2).
    pub(super) fn rlimits(&self) -> &[Rlimit] {
        &self.rlimits
    }

    /// What is to be written into the files of a control group: the field that asks for it, the
    /// controller, the file, the value.
    pub(super) fn settings(&self) -> Vec<Setting> {
        let memory = self.memory.map(|bytes| Setting {
            field: "limits.memory_bytes",
            controller: "memory",
            file: "memory.max",
            value: bytes.to_string(),
        });
        let pids = self.pids.map(|pids| Setting {
            field: "limits.pids",
            controller: "pids",
            file: "pids.max",
            value: pids.to_string(),
        });
        let cpu = self.cpu_millis.map(|millis| Setting {
            field: "limits.cpu_millis",
            controller: "cpu",
            file: "cpu.max",
            value: format!("{} {CPU_PERIOD}", millis * (CPU_PERIOD / 1000)),
        });
        [memory, pids, cpu].into_iter().flatten().collect()
    }
}

/// The name of a limit of setrlimit(2).
pub(super) fn rlimit_name(limit: &Rlimit) -> &'static str {
    let place = usize::try_from(limit.resource).unwrap_or(usize::MAX);
    RLIMITS.get(place).copied().unwrap_or("unknown")
}

/// A value for a file of a control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) field: &'static str,
    pub(super) controller: &'static str,
    pub(super) file: &'static str,
    pub(super) value: String,
}

fn within(field: &str, value: Option<u64>, min: u64, max: u64) -> Result<(), LimitError> {
    match value {
        Some(value) if !(min..=max).contains(&value) => Err(LimitError {
            field: field.to_owned(),
            why: format!("is {value}, which is not between {min} and {max}"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_name_their_field() {
        for (limits, field) in [
            (Limits::new(Some(4096), None, None), "limits.memory_bytes"),
            (Limits::new(None, Some(0), None), "limits.pids"),
            (Limits::new(None, None, Some(9)), "limits.cpu_millis"),
            (Limits::new(Some(u64::MAX), None, None), "limits.memory_bytes"),
        ] {
            assert_eq!(limits.unwrap_err().field, field);
        }
    }

    #[test]
    fn rlimits_have_the_kernels_numbers_and_names_in_any_case() {
        let mut limits = Limits::default();
        limits.add_rlimit("RLIMIT_CORE", Some(0), Some(5)).unwrap();
        limits.add_rlimit("noFile", None, Some(64)).unwrap();
        limits.add_rlimit("rttime", None, None).unwrap();
        let infinite = libc::RLIM_INFINITY;
        let limit = |resource, soft, hard| Rlimit { resource, soft, hard };
        let expected = [limit(4, 0, 5), limit(7, 64, 64), limit(15, infinite, infinite)];
        assert_eq!(limits.rlimits(), expected);
        for (name, number) in [
            ("core", libc::RLIMIT_CORE),
            ("nofile", libc::RLIMIT_NOFILE),
            ("nproc", libc::RLIMIT_NPROC),
            ("as", libc::RLIMIT_AS),
            ("memlock", libc::RLIMIT_MEMLOCK),
            ("rttime", libc::RLIMIT_RTTIME),
        ] {
            assert_eq!(RLIMITS[usize::try_from(number).unwrap()], name);
        }
    }

    #[test]
    fn rlimits_that_make_no_sense_say_which() {
        let mut limits = Limits::default();
        limits.add_rlimit("core", None, None).unwrap();
        let error = |limits: &mut Limits, name: &str, soft, hard| {
            limits.add_rlimit(name, soft, hard).unwrap_err().to_string()
        };
        assert!(error(&mut limits, "files", None, None).contains("[1]` names no limit: 'files'"));
        assert!(error(&mut limits, "RLIMIT_CORE", None, None).contains("a second time"));
        let crossed = error(&mut limits, "nofile", Some(2), Some(1));
        assert!(crossed.contains("nofile above the hard one: 2 > 1"), "{crossed}");
        assert_eq!(limits.rlimits().len(), 1);
    }

    #[test]
    fn processor_time_is_a_share_of_each_period() {
        let settings = Limits::new(None, None, Some(1500)).unwrap().settings();
        assert_eq!(settings[0].value, "150000 100000");
    }
}
