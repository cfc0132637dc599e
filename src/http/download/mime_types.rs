//! The types of files by the extensions of their names, as Go's `mime` package knows them: a small table,
//! and the database of the guest, if it has one.

use std::{collections::HashMap, fs::File, io::Read, path::Path, sync::OnceLock};

/// The most bytes of a database that are read; that of shared-mime-info has 35 KB.
const MAX_DATABASE: u64 = 4 << 20;

/// The types that need no database.
const BUILT_IN: [(&str, &str); 17] = [
    ("avif", "image/avif"),
    ("css", "text/css; charset=utf-8"),
    ("gif", "image/gif"),
    ("htm", "text/html; charset=utf-8"),
    ("html", "text/html; charset=utf-8"),
    ("ico", "image/vnd.microsoft.icon"),
    ("jpeg", "image/jpeg"),
    ("jpg", "image/jpeg"),
    ("js", "text/javascript; charset=utf-8"),
    ("json", "application/json"),
    ("mjs", "text/javascript; charset=utf-8"),
    ("pdf", "application/pdf"),
    ("png", "image/png"),
    ("svg", "image/svg+xml"),
    ("wasm", "application/wasm"),
    ("webp", "image/webp"),
    ("xml", "text/xml; charset=utf-8"),
];

/// Those of shared-mime-info; the first of a kind that is there is the only one.
const GLOBS: [&str; 2] = ["/usr/local/share/mime/globs2", "/usr/share/mime/globs2"];
/// Read where there is none of [`GLOBS`], all of them.
const TYPE_FILES: [&str; 4] = [
    "/etc/mime.types",
    "/etc/apache2/mime.types",
    "/etc/apache/mime.types",
    "/etc/httpd/conf/mime.types",
];

/// Types by extensions without their dot.
#[derive(Debug)]
pub(super) struct MimeTypes(HashMap<String, String>);

impl MimeTypes {
    /// Those of this guest, read once. Reading may block.
    pub(super) fn of_guest() -> &'static Self {
        static TYPES: OnceLock<MimeTypes> = OnceLock::new();
        TYPES.get_or_init(|| {
            let mut types = Self::built_in();
            if let Some(globs) = GLOBS.iter().find_map(|path| read(path)) {
                types.add_globs(&globs);
            } else {
                for text in TYPE_FILES.iter().filter_map(|path| read(path)) {
                    types.add_types(&text);
                }
            }
            types
        })
    }

    fn built_in() -> Self {
        Self(BUILT_IN.map(|(extension, kind)| (extension.to_owned(), kind.to_owned())).into())
    }

    /// The type of a file of that name: by its extension as it is written, else in lower case.
    pub(super) fn get(&self, path: &Path) -> Option<&str> {
        let name = path.file_name()?.to_string_lossy();
        let (_, extension) = name.rsplit_once('.')?;
        let found = self.0.get(extension);
        // A name that begins with its only dot has an extension too, as with Go.
        found.or_else(|| self.0.get(&extension.to_ascii_lowercase())).map(String::as_str)
    }

    /// Adds lines `WEIGHT:TYPE:*.EXTENSION`; what is known already stays.
    fn add_globs(&mut self, text: &str) {
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let mut fields = line.split(':').skip(1);
            let (Some(kind), Some(glob)) = (fields.next(), fields.next()) else { continue };
            let extension = glob.strip_prefix("*.").filter(|rest| !rest.contains(['?', '*', '[']));
            if let Some(extension) = extension
                && !self.0.contains_key(extension)
            {
                self.add(extension, kind);
            }
        }
    }

    /// Adds lines `TYPE EXTENSION ...`, also for extensions that are known already.
    fn add_types(&mut self, text: &str) {
        for line in text.lines() {
            let mut fields = line.split_whitespace().take_while(|field| !field.starts_with('#'));
            let Some(kind) = fields.next() else { continue };
            fields.for_each(|extension| self.add(extension, kind));
        }
    }

    fn add(&mut self, extension: &str, kind: &str) {
        let charset = match kind.starts_with("text/") && !kind.contains(';') {
            true => "; charset=utf-8",
            false => "",
        };
        self.0.insert(extension.to_owned(), format!("{kind}{charset}"));
    }
}

fn read(path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_DATABASE).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_database_few_extensions_are_known() {
        let types = MimeTypes::built_in();
        let of = |name: &str| types.get(Path::new(name));
        assert_eq!(of("/a.mjs"), Some("text/javascript; charset=utf-8"));
        assert_eq!(of("/a.b.XML"), Some("text/xml; charset=utf-8"));
        for unknown in ["/a.ts", "/a.py", "/a.md", "/json", "/a.", "/", "/a.json/b"] {
            assert_eq!(of(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn databases_are_read_as_go_reads_them() {
        let mut types = MimeTypes::built_in();
        types.add_globs("# comment\n50:text/x-python:*.py\n50:text/other:*.py\n50:application/xml:*.xml\n50:a/b:*.x?\n50:a/c:README\n10\n");
        let of = |types: &MimeTypes, name: &str| types.get(Path::new(name)).map(str::to_owned);
        assert_eq!(of(&types, "/a.py").as_deref(), Some("text/x-python; charset=utf-8"));
        assert_eq!(of(&types, "/a.xml").as_deref(), Some("text/xml; charset=utf-8"));
        assert_eq!(of(&types, "/a.x?"), None);
        types
            .add_types("# comment\nvideo/mp2t ts m2ts # more\napplication/xml xml\n\nimage/none\n");
        assert_eq!(of(&types, "/a.ts").as_deref(), Some("video/mp2t"));
        assert_eq!(of(&types, "/a.xml").as_deref(), Some("application/xml"));
        assert_eq!(of(&types, "/a.more"), None);
    }
}
