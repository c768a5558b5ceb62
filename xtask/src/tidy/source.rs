//! Required attributes of Rust sources, and maximum lengths.

use super::Files;
use super::graph::Package;

/// Maximum lines of a function, with signature and closing brace: what fits on a screen.
const MAX_FUNCTION_LINES: usize = 70;
/// Maximum lines of a file before its tests.
const MAX_FILE_LINES: usize = 600;

/// Functions (`path:name`) and files (`path`) that may be longer, with the reason.
const LONGER: &[(&str, &str)] = &[];

/// Crates that need `unsafe`. The guest module's shim is not a member of the workspace.
const MAY_BE_UNSAFE: &[&str] = &["host-memory"];
/// Crates of which only one file may use `unsafe`.
const ONE_UNSAFE_FILE: &[(&str, &str)] = &[("vmm", "crates/vmm/src/kvm.rs")];
/// Crates that run in the kernel.
const WITHOUT_STD: &[&str] = &["balloon-abi", "balloon-driver"];

/// Returns missing attributes in root files of crates.
pub(super) fn check_roots(packages: &[Package], files: &Files) -> Vec<String> {
    let mut problems = Vec::new();
    for package in packages {
        let name = package.name.as_str();
        let mut wanted = Vec::new();
        if ONE_UNSAFE_FILE.iter().any(|(one, _)| *one == name) {
            wanted.push("#![deny(unsafe_code)]");
        } else if !MAY_BE_UNSAFE.contains(&name) {
            wanted.push("#![forbid(unsafe_code)]");
        }
        if WITHOUT_STD.contains(&name) {
            wanted.push("#![no_std]");
        }
        for root in &package.roots {
            let text = files.get(root).unwrap_or_default();
            let missing = wanted.iter().filter(|line| !text.lines().any(|said| said == **line));
            problems.extend(missing.map(|line| format!("{root}: lacks {line}")));
        }
    }
    problems
}

/// Returns files that allow `unsafe` although their crate denies it.
pub(super) fn check_unsafe_files(files: &Files) -> Vec<String> {
    let allows = |text: &str| text.contains(concat!("allow(", "unsafe_code"));
    let known = |path: &str| ONE_UNSAFE_FILE.iter().any(|(_, file)| *file == path);
    let others = files.iter().filter(|(path, text)| path.ends_with(".rs") && allows(text));
    let others = others.filter(|(path, _)| !known(path));
    others.map(|(path, _)| format!("{path}: must not allow unsafe code")).collect()
}

/// Returns functions and files that are too long, and stale exceptions.
pub(super) fn check_lengths(files: &Files) -> Vec<String> {
    let sources = files.iter().filter(|(path, _)| path.ends_with(".rs"));
    let long: Vec<_> = sources.flat_map(|(path, text)| too_long(path, text)).collect();
    let excused = |what: &str| LONGER.iter().any(|(known, _)| *known == what);
    let stale = LONGER.iter().filter(|(known, _)| !long.iter().any(|(what, _)| what == known));
    let stale = stale.map(|(known, _)| format!("{known}: is in LONGER and is not too long"));
    let over = long.iter().filter(|(what, _)| !excused(what));
    over.map(|(what, lines)| format!("{what}: {lines} lines")).chain(stale).collect()
}

/// Returns what is too long in one file, with its lines.
fn too_long(path: &str, text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut long = Vec::new();
    let before_tests = lines_before_tests(&lines);
    if before_tests > MAX_FILE_LINES {
        long.push((path.to_owned(), before_tests));
    }
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        let length = function_lines(&lines[at..]);
        if length > MAX_FUNCTION_LINES {
            long.push((format!("{path}:{name}"), length));
        }
    }
    long
}

fn lines_before_tests(lines: &[&str]) -> usize {
    let tests = lines
        .windows(2)
        .position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests"));
    tests.unwrap_or(lines.len())
}

/// Name of the function that starts on `line`, if any.
fn function_name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("fn ")?;
    let is_qualifier = |word: &str| {
        matches!(word, "pub" | "const" | "async" | "unsafe" | "extern" | "default")
            || word.starts_with("pub(")
            || word.ends_with(')')
            || word.starts_with('"')
    };
    if !before.split_whitespace().all(is_qualifier) {
        return None;
    }
    let end = after.find(|c: char| !c.is_alphanumeric() && c != '_')?;
    (end > 0).then(|| &after[..end])
}

/// Number of lines of the function that starts on the first line. rustfmt puts its closing brace in
/// the same column.
fn function_lines(lines: &[&str]) -> usize {
    let Some(first) = lines.first() else { return 0 };
    let indent = &first[..first.len() - first.trim_start().len()];
    let ends_here = |line: &str| {
        line.strip_prefix(indent).is_some_and(|rest| rest == "}" || rest.ends_with("; }"))
    };
    let on_one_line = first.ends_with('}') || first.ends_with(';');
    if on_one_line {
        return 1;
    }
    for (at, line) in lines.iter().enumerate().skip(1) {
        let rest = line.strip_prefix(indent).unwrap_or_default();
        // A declaration without a body ends with its signature.
        if ends_here(line) || (rest.starts_with(')') && rest.ends_with(';')) {
            return at + 1;
        }
    }
    lines.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(indent: &str, lines: usize) -> String {
        let body = format!("{indent}    step();\n").repeat(lines - 2);
        format!("{indent}pub(crate) const fn walk<T>(\n{body}{indent}}}\n")
    }

    #[test]
    fn long_functions_are_problems() {
        let text = format!("impl T {{\n{}}}\n{}", function("    ", 71), function("", 70));
        assert_eq!(too_long("a.rs", &text), [("a.rs:walk".to_owned(), 71)]);
    }

    #[test]
    fn one_function_does_not_hide_the_next() {
        let text = format!(
            "trait T {{\n    fn a(\n        &self,\n    ) -> u8;\n    fn b();\n\n{}}}\n",
            function("    ", 80)
        );
        assert_eq!(too_long("a.rs", &text), [("a.rs:walk".to_owned(), 80)]);
    }

    #[test]
    fn long_files_without_their_tests_are_problems() {
        let code = "const A: u8 = 1;\n".repeat(600);
        let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "// more\n".repeat(900));
        assert_eq!(too_long("a.rs", &format!("{code}{tests}")), []);
        let longer = format!("{code}const B: u8 = 1;\n{tests}");
        assert_eq!(too_long("a.rs", &longer), [("a.rs".to_owned(), 601)]);
        assert_eq!(check_lengths(&Files(vec![("a.rs".to_owned(), longer)])), ["a.rs: 601 lines"]);
    }

    #[test]
    fn function_names_are_parsed() {
        assert_eq!(function_name("    pub(in crate::a) async unsafe fn go() {"), Some("go"));
        assert_eq!(function_name("pub extern \"C\" fn c_side("), Some("c_side"));
        assert_eq!(function_name("    let f: fn (u8) = go;"), None);
        assert_eq!(function_name("// a fn that is a word"), None);
        assert_eq!(function_name("type Body = fn(&[u8]);"), None);
    }

    #[test]
    fn only_the_listed_file_may_use_unsafe() {
        let text = concat!("#![allow(", "unsafe_code)]\n").to_owned();
        let file = |path: &str| Files(vec![(path.to_owned(), text.clone())]);
        assert_eq!(check_unsafe_files(&file("crates/vmm/src/kvm.rs")), Vec::<String>::new());
        assert_eq!(
            check_unsafe_files(&file("crates/vmm/src/mmio.rs")),
            ["crates/vmm/src/mmio.rs: must not allow unsafe code"]
        );
    }

    #[test]
    fn crate_roots_must_forbid_unsafe_and_kernel_crates_std() {
        let package = |name: &str| Package {
            name: name.to_owned(),
            needs: vec![],
            roots: vec![format!("{name}.rs")],
        };
        let packages = [package("balloon-abi"), package("lab"), package("host-memory")];
        let text = |path: &str, text: &str| (path.to_owned(), text.to_owned());
        let bad = Files(vec![
            text("balloon-abi.rs", "// #![no_std]\n#![forbid(unsafe_code)]\n"),
            text("lab.rs", "#![deny(unsafe_code)]\n"),
            text("host-memory.rs", ""),
        ]);
        assert_eq!(
            check_roots(&packages, &bad),
            ["balloon-abi.rs: lacks #![no_std]", "lab.rs: lacks #![forbid(unsafe_code)]",]
        );
        let good = Files(vec![
            text("balloon-abi.rs", "#![no_std]\n#![forbid(unsafe_code)]\n"),
            text("lab.rs", "#![forbid(unsafe_code)]\n"),
        ]);
        assert_eq!(check_roots(&packages, &good), Vec::<String>::new());
    }
}
