//! What is searched for: the request, checked and compiled.

use std::{path::Path, time::Duration};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use grep_regex::{RegexMatcher, RegexMatcherBuilder};

use crate::{
    fs::{FsError, Kind, PathError},
    quote,
};

/// The globs of one search, both lists together.
pub const MAX_GLOBS: usize = 256;
/// The length of one.
pub const MAX_GLOB_BYTES: usize = 4096;
/// The length of a pattern.
pub const MAX_PATTERN_BYTES: usize = 16 << 10;
/// The memory that a compiled pattern may take, and again what it may take while it searches.
pub const MAX_REGEX_BYTES: usize = 4 << 20;
/// Matches after which a search ends, where the request says nothing.
pub const DEFAULT_MATCHES: u32 = 10_000;
/// The most that a request may ask for.
pub const MAX_MATCHES: u32 = 1_000_000;
/// Bytes of files after which a search ends, where the request says nothing.
pub const DEFAULT_BYTES_READ: u64 = 16 << 30;
/// Bytes of matches after which a search ends, where the request says nothing.
pub const DEFAULT_BYTES_RETURNED: u64 = 16 << 20;
/// The most that a request may ask for.
pub const MAX_BYTES_RETURNED: u64 = 256 << 20;
/// The length at which lines are cut, where the request says nothing.
pub const DEFAULT_LINE_BYTES: u32 = 4096;
/// The most that a request may ask for.
pub const MAX_LINE_BYTES: u32 = 65_536;
/// The time after which a search ends, where the request says nothing.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// The most that a request may ask for.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(3600);
/// The lines of context before a match, and again those after it.
pub const MAX_CONTEXT: u32 = 100;

/// What is asked for. Zero and empty mean the default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SearchOptions {
    /// Globs of which a name has to match one.
    pub include: Vec<String>,
    /// Globs of what is left out.
    pub exclude: Vec<String>,
    /// What a line has to match; empty to search by name.
    pub pattern: String,
    /// `pattern` is plain text.
    pub fixed_string: bool,
    /// Upper and lower case are the same.
    pub ignore_case: bool,
    /// `pattern` matches whole words.
    pub word: bool,
    /// Search what begins with a dot.
    pub hidden: bool,
    /// Obey `.gitignore` and `.ignore`.
    pub gitignore: bool,
    /// Search files with NUL bytes.
    pub binary: bool,
    /// Levels below the root.
    pub max_depth: u32,
    /// Matches.
    pub max_matches: u32,
    /// Bytes of files.
    pub max_bytes_read: u64,
    /// Bytes of matches.
    pub max_bytes_returned: u64,
    /// Files that are larger are skipped.
    pub max_file_bytes: u64,
    /// Where lines are cut.
    pub max_line_bytes: u32,
    /// The time.
    pub timeout: Option<Duration>,
    /// Lines before each match.
    pub before_context: u32,
    /// Lines after each match.
    pub after_context: u32,
    /// Describe what was found.
    pub include_entry: bool,
}

/// Why there is no search.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// A glob cannot be read.
    #[error("{field}: '{}' is no glob: {why}", quote::text(.glob))]
    Glob {
        /// The list it is in.
        field: &'static str,
        /// The glob.
        glob: String,
        /// What is wrong with it.
        why: String,
    },
    /// Too many globs.
    #[error("include, exclude: more than {MAX_GLOBS} globs")]
    TooManyGlobs,
    /// The pattern is longer than is taken.
    #[error("pattern: longer than {MAX_PATTERN_BYTES} bytes")]
    PatternTooLong,
    /// The pattern cannot be read, or would take too much memory.
    #[error("pattern: {0}")]
    Pattern(String),
    /// A number is larger than is allowed.
    #[error("{field}: {value} is more than {max}")]
    TooMuch {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The bound.
        max: u64,
    },
    /// The time is none, or longer than is allowed.
    #[error("timeout: not between 0 and {} seconds", MAX_TIMEOUT.as_secs())]
    Timeout,
    /// There is no such path.
    #[error("path not found: {0}")]
    NotFound(PathError),
    /// The root is neither a directory nor a regular file.
    #[error("path '{}' is neither a directory nor a regular file", quote::path(.0))]
    Special(std::path::PathBuf),
    /// The root cannot be opened.
    #[error("error searching: {0}")]
    Open(PathError),
    /// The file system cannot be asked.
    #[error(transparent)]
    Files(#[from] FsError),
}

impl SearchError {
    /// The class of the error.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Glob { .. }
            | Self::TooManyGlobs
            | Self::PatternTooLong
            | Self::Pattern(_)
            | Self::TooMuch { .. }
            | Self::Timeout
            | Self::Special(_) => Kind::InvalidArgument,
            Self::NotFound(_) => Kind::NotFound,
            Self::Open(_) => Kind::Internal,
            Self::Files(error) => error.kind(),
        }
    }
}

/// A search that is ready to run.
#[derive(Debug)]
pub struct Query {
    include: Option<Globs>,
    exclude: Option<Globs>,
    /// None to search by name.
    pub(super) matcher: Option<RegexMatcher>,
    pub(super) options: SearchOptions,
    pub(super) timeout: Duration,
}

impl Query {
    /// Checks and compiles what is asked for.
    ///
    /// # Errors
    /// [`SearchError`], naming the field.
    pub fn new(mut options: SearchOptions) -> Result<Self, SearchError> {
        let set = |value: &mut u32, default| {
            if *value == 0 {
                *value = default;
            }
        };
        set(&mut options.max_matches, DEFAULT_MATCHES);
        set(&mut options.max_line_bytes, DEFAULT_LINE_BYTES);
        for (value, default) in [
            (&mut options.max_bytes_read, DEFAULT_BYTES_READ),
            (&mut options.max_bytes_returned, DEFAULT_BYTES_RETURNED),
        ] {
            if *value == 0 {
                *value = default;
            }
        }
        for (field, value, max) in [
            ("max_matches", options.max_matches.into(), MAX_MATCHES.into()),
            ("max_line_bytes", options.max_line_bytes.into(), MAX_LINE_BYTES.into()),
            ("max_bytes_returned", options.max_bytes_returned, MAX_BYTES_RETURNED),
            ("before_context", options.before_context.into(), MAX_CONTEXT.into()),
            ("after_context", options.after_context.into(), MAX_CONTEXT.into()),
        ] {
            if value > max {
                return Err(SearchError::TooMuch { field, value, max });
            }
        }
        let timeout = options.timeout.unwrap_or(DEFAULT_TIMEOUT);
        if timeout.is_zero() || timeout > MAX_TIMEOUT {
            return Err(SearchError::Timeout);
        }
        if options.include.len() + options.exclude.len() > MAX_GLOBS {
            return Err(SearchError::TooManyGlobs);
        }
        let matcher = match options.pattern.is_empty() {
            true => None,
            false => Some(compile(&options)?),
        };
        Ok(Self {
            include: Globs::new("include", &options.include, options.ignore_case)?,
            exclude: Globs::new("exclude", &options.exclude, options.ignore_case)?,
            matcher,
            options,
            timeout,
        })
    }

    /// Whether a name is among those that are looked for.
    pub(super) fn includes(&self, rel: &Path, is_dir: bool) -> bool {
        self.include.as_ref().is_none_or(|globs| globs.matches(rel, is_dir))
    }

    /// Whether a name is left out, with all that is below it.
    pub(super) fn excludes(&self, rel: &Path, is_dir: bool) -> bool {
        self.exclude.as_ref().is_some_and(|globs| globs.matches(rel, is_dir))
    }
}

fn compile(options: &SearchOptions) -> Result<RegexMatcher, SearchError> {
    if options.pattern.len() > MAX_PATTERN_BYTES {
        return Err(SearchError::PatternTooLong);
    }
    RegexMatcherBuilder::new()
        .fixed_strings(options.fixed_string)
        .case_insensitive(options.ignore_case)
        .word(options.word)
        .line_terminator(Some(b'\n'))
        .size_limit(MAX_REGEX_BYTES)
        .dfa_size_limit(MAX_REGEX_BYTES)
        .build(&options.pattern)
        .map_err(|error| SearchError::Pattern(error.to_string()))
}

/// Globs over paths below the root.
#[derive(Debug)]
struct Globs {
    any: GlobSet,
    /// Those that end with a slash.
    dirs: GlobSet,
}

impl Globs {
    /// None for an empty list.
    fn new(
        field: &'static str,
        globs: &[String],
        ignore_case: bool,
    ) -> Result<Option<Self>, SearchError> {
        if globs.is_empty() {
            return Ok(None);
        }
        let (mut any, mut dirs) = (GlobSetBuilder::new(), GlobSetBuilder::new());
        for glob in globs {
            let wrong = |why: String| {
                let glob = glob.clone();
                SearchError::Glob { field, glob, why }
            };
            if glob.len() > MAX_GLOB_BYTES {
                return Err(wrong(format!("it is longer than {MAX_GLOB_BYTES} bytes")));
            }
            let text = glob.trim_end_matches('/');
            let anchored = text.strip_prefix('/').unwrap_or(text);
            if anchored.is_empty() {
                return Err(wrong("it matches nothing".to_owned()));
            }
            let text = match text.contains('/') {
                true => anchored.to_owned(),
                false => format!("**/{text}"),
            };
            let compiled = GlobBuilder::new(&text)
                .literal_separator(true)
                .backslash_escape(true)
                .case_insensitive(ignore_case)
                .build()
                .map_err(|error| wrong(error.kind().to_string()))?;
            if glob.ends_with('/') {
                dirs.add(compiled);
            } else {
                any.add(compiled);
            }
        }
        let build = |set: GlobSetBuilder| {
            set.build().map_err(|error| {
                let glob = error.glob().unwrap_or_default().to_owned();
                SearchError::Glob { field, glob, why: error.kind().to_string() }
            })
        };
        Ok(Some(Self { any: build(any)?, dirs: build(dirs)? }))
    }

    fn matches(&self, rel: &Path, is_dir: bool) -> bool {
        self.any.is_match(rel) || (is_dir && self.dirs.is_match(rel))
    }
}
