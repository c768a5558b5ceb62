//! What the text of the repository may not hold, and what ARCHITECTURE.md must.

use super::Files;
use super::graph::Package;

/// What betrays the machine that something was written on: homes and work
/// directories as absolute paths, and private mirrors of registries. Written in
/// two halves, since this file is looked at too.
const BETRAYALS: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/ho", "me/"),
    concat!("arti", "factory"),
    concat!("jf", "rog"),
    concat!("index.", "crates.io"),
    concat!(".py", "env"),
    concat!("/tmp/", "team"),
];

const ARCHITECTURE: &str = "ARCHITECTURE.md";

/// Lines that name a machine's paths or registries.
pub(super) fn check_words(files: &Files) -> Vec<String> {
    let mut problems = Vec::new();
    for (path, text) in files.iter() {
        for (number, line) in (1..).zip(text.lines()) {
            let found = BETRAYALS.iter().filter(|word| names(line, word));
            problems.extend(found.map(|word| format!("{path}:{number}: names {word}")));
        }
    }
    problems
}

/// True when `line` holds `word`; an absolute path must begin there, not go on.
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !word.starts_with('/') || !before.is_some_and(is_of_a_path)
    })
}

fn is_of_a_path(c: char) -> bool {
    c.is_alphanumeric() || "_-.~}$".contains(c)
}

/// Crates that ARCHITECTURE.md does not name.
pub(super) fn check_architecture(packages: &[Package], files: &Files) -> Vec<String> {
    let Some(text) = files.get(ARCHITECTURE) else {
        return vec![format!("{ARCHITECTURE}: is missing; it must name every crate")];
    };
    let is_of_a_name = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let words: Vec<&str> = text.split(|c| !is_of_a_name(c)).collect();
    let missing = packages.iter().filter(|package| !words.contains(&package.name.as_str()));
    missing.map(|package| format!("{ARCHITECTURE}: does not name {}", package.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: String) -> Files {
        Files(vec![(path.to_owned(), text)])
    }

    #[test]
    fn each_betrayal_is_found() {
        for word in BETRAYALS {
            let problems = check_words(&file("docs/a.md", format!("fine\nsee {word}x\n")));
            assert_eq!(problems, [format!("docs/a.md:2: names {word}")]);
        }
    }

    #[test]
    fn relative_paths_betray_nothing() {
        for word in BETRAYALS.iter().filter(|word| word.starts_with('/')) {
            let text = format!("target{word}x and $HOME{word}y and ..{word}z");
            assert_eq!(check_words(&file("a.rs", text)), Vec::<String>::new());
        }
    }

    #[test]
    fn architecture_must_name_every_crate() {
        let package = |name: &str| Package { name: name.to_owned(), ..Package::default() };
        let packages = [package("lab"), package("page-set")];
        let page = |text: &str| file(ARCHITECTURE, text.to_owned());
        let check = |files| check_architecture(&packages, &files);
        assert_eq!(check(page("| `lab` | `page-set` |")), Vec::<String>::new());
        assert_eq!(
            check(page("the laboratory, page-sets and crates/lab")),
            ["ARCHITECTURE.md: does not name page-set"]
        );
        assert_eq!(
            check(file("README.md", String::new())),
            ["ARCHITECTURE.md: is missing; it must name every crate"]
        );
    }
}
