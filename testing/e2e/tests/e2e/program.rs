//! The `aerostat` program.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Environment variable: path of the program, instead of a build.
const PROGRAM_VARIABLE: &str = "AEROSTAT_PROGRAM";

/// Root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The cargo that runs these tests.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).stdin(Stdio::null());
    cargo
}

/// The `aerostat-lab` next to it.
pub(crate) fn lab_program() -> PathBuf {
    program().with_file_name("aerostat-lab")
}

/// The up-to-date release build of `aerostat`.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os(PROGRAM_VARIABLE) {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "aerostat", "--package", "aerostat-lab"]);
    let messages = succeed(&mut build).0;
    let messages = messages.lines().filter_map(|line| serde_json::from_str(line).ok());
    let mut programs = messages.filter_map(|message: serde_json::Value| {
        let is_program = message["target"]["name"] == "aerostat";
        message["executable"].as_str().filter(|_| is_program).map(PathBuf::from)
    });
    programs.next().expect("cargo prints the program's path")
}

/// Standard output and standard error of a command that must succeed.
pub(crate) fn succeed(command: &mut Command) -> (String, String) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (code, out, err) = outcome(&output);
    assert_eq!(code, Some(0), "{command:?}\n{out}{err}");
    (out, err)
}

/// Exit code, standard output and standard error.
pub(crate) fn outcome(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}
