//! A server with a fake balloon, and its client.

use std::sync::Arc;

use control::{Client, ControlError, Limits, Server};
use tempfile::TempDir;

use super::{FakeBalloon, Guest};

pub(crate) struct Setup {
    pub(crate) balloon: Arc<FakeBalloon>,
    pub(crate) server: Server,
    pub(crate) client: Client,
    pub(crate) dir: TempDir,
}

pub(crate) fn setup(guest: Guest, limits: Limits) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let balloon = Arc::new(FakeBalloon::new("web-1", guest));
    let path = dir.path().join("web-1.sock");
    let server = Server::bind_with(&path, Arc::clone(&balloon) as _, limits).unwrap();
    let client = Client::connect(&path).unwrap();
    Setup { balloon, server, client, dir }
}

pub(crate) fn answered(error: ControlError) -> (u16, String, String) {
    match error {
        ControlError::Answered { status, error, hint } => (status, error, hint),
        other => panic!("not an answer of the server: {other:?}"),
    }
}
