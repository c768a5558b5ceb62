//! `cargo xtask tidy`: checks rules of ARCHITECTURE.md that no compiler checks.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::{output, root};

mod circles;
mod graph;
mod pages;
mod source;

/// Checks the crate graph, the sources and the pages of the repository.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: &Args) -> Result<()> {
    let root = root();
    let files = Files::read(&root)?;
    let packages = graph::packages(&root)?;
    let mut problems = graph::check(&packages, &files);
    problems.extend(circles::check_circles(&files));
    problems.extend(source::check_roots(&packages, &files));
    problems.extend(source::check_unsafe_files(&files));
    problems.extend(source::check_lengths(&files));
    problems.extend(pages::check_words(&files));
    problems.extend(pages::check_maps(&files));
    ensure!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
    Ok(())
}

/// Text files of the repository, with their paths from its root.
struct Files(Vec<(String, String)>);

impl Files {
    /// Reads tracked files and untracked files that are not ignored. Skips binary files.
    fn read(root: &Path) -> Result<Self> {
        let mut git = Command::new("git");
        git.arg("-C").arg(root).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
        let (list, _) = output(&mut git)?;
        let mut files = Vec::new();
        for path in list.lines() {
            let bytes = match fs::read(root.join(path)) {
                Ok(bytes) => bytes,
                // Removed but not committed, or a dangling link.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).context(path.to_owned()),
            };
            if let Ok(text) = String::from_utf8(bytes) {
                files.push((path.to_owned(), text));
            }
        }
        ensure!(!files.is_empty(), "git lists no files");
        Ok(Self(files))
    }

    fn get(&self, path: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == path).map(|(_, text)| text)
    }

    fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(path, text)| (path.as_str(), text.as_str()))
    }
}
