//! Forbidden text, and paths in the documentation that do not exist.

use super::Files;

/// Text that reveals the machine on which something was written: absolute paths of home and work
/// directories, and private registry mirrors. Split in halves, because this file is checked too.
const MACHINE_NAMES: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/ho", "me/"),
    concat!("arti", "factory"),
    concat!("jf", "rog"),
    concat!("index.", "crates.io"),
    concat!(".py", "env"),
    concat!("/tmp/", "team"),
];

/// Lines that name a machine's paths or registries.
pub(super) fn check_words(files: &Files) -> Vec<String> {
    let mut problems = Vec::new();
    for (path, text) in files.iter() {
        for (number, line) in (1..).zip(text.lines()) {
            let found = MACHINE_NAMES.iter().filter(|word| names(line, word));
            problems.extend(found.map(|word| format!("{path}:{number}: names {word}")));
        }
    }
    problems
}

/// Whether `line` contains `word`. An absolute path must start there, not continue.
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !word.starts_with('/') || !before.is_some_and(is_of_a_path)
    })
}

fn is_of_a_path(c: char) -> bool {
    c.is_alphanumeric() || "_-.~}$".contains(c)
}

/// Pages with paths of the tree.
const MAPS: [&str; 3] = ["ARCHITECTURE.md", "docs/design/decisions.md", "docs/design/paths.md"];

/// Prefixes of paths in the tree.
const PLACES: [&str; 5] = ["crates/", "docs/", "guest/", "testing/", "xtask/"];

/// Returns paths in [`MAPS`] that do not exist.
pub(super) fn check_maps(files: &Files) -> Vec<String> {
    let is_there = |place: &str| {
        let place = place.trim_end_matches('/');
        files.iter().any(|(path, _)| {
            path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    };
    let mut problems = Vec::new();
    for (map, text) in files.iter().filter(|(path, _)| MAPS.contains(path)) {
        for (number, line) in (1..).zip(text.lines()) {
            let quoted = line.split('`').skip(1).step_by(2);
            let places = quoted.filter(|text| PLACES.iter().any(|start| text.starts_with(start)));
            let missing = places.filter(|place| !is_there(place));
            problems.extend(missing.map(|place| format!("{map}:{number}: there is no {place}")));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: String) -> Files {
        Files(vec![(path.to_owned(), text)])
    }

    #[test]
    fn every_machine_name_is_a_problem() {
        for word in MACHINE_NAMES {
            let problems = check_words(&file("docs/a.md", format!("fine\nsee {word}x\n")));
            assert_eq!(problems, [format!("docs/a.md:2: names {word}")]);
        }
    }

    #[test]
    fn relative_paths_are_allowed() {
        for word in MACHINE_NAMES.iter().filter(|word| word.starts_with('/')) {
            let text = format!("target{word}x and $HOME{word}y and ..{word}z");
            assert_eq!(check_words(&file("a.rs", text)), Vec::<String>::new());
        }
    }

    #[test]
    fn a_path_that_does_not_exist_is_a_problem() {
        let map = "See `crates/a/src/b.rs`, `crates/a/src/`, `testing/fuzz/bodies` and `c.rs`.\n";
        let paths = ["crates/a/src/b.rs", "testing/fuzz/bodies/lib.rs"];
        let mut files = file("ARCHITECTURE.md", map.to_owned());
        files.0.extend(paths.map(|path| (path.to_owned(), String::new())));
        assert_eq!(check_maps(&files), Vec::<String>::new());
        files.0.retain(|(path, _)| !path.starts_with("crates/"));
        let gone = ["crates/a/src/b.rs", "crates/a/src/"];
        assert_eq!(
            check_maps(&files),
            gone.map(|place| format!("ARCHITECTURE.md:1: there is no {place}"))
        );
    }
}
