//! A source whose destination is hostile.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use migration::observer::Silent;
use migration::{SourceConfig, SourceFailure, SourceGuest, migrate};

use super::machine::Source;
use super::{Body, Frames, Scripted, kind};
use crate::script::Script;

/// Connections of a source; the last of them resolve a doubt.
const MAX_LINKS: usize = 4;

pub(super) fn run(script: &mut Script<'_>) {
    let connections = script.pick([1, 1, 2]);
    let config = SourceConfig { connections, max_rounds: 5, ..SourceConfig::default() };
    let mut words: Vec<Frames> = (0..MAX_LINKS).map(|_| Frames::new()).collect();
    let mut honest = 0;
    while !script.is_over() {
        let step = script.u8();
        let on = usize::from(step >> 6);
        words[on].push(frame(script, step % 16, &mut honest));
    }
    let received: Arc<Mutex<Vec<u8>>> = Arc::default();
    let mut words = words.into_iter();
    let mut first = Some(Arc::clone(&received));
    let mut connect = || {
        let frames = words.next().ok_or(io::ErrorKind::ConnectionRefused)?;
        Ok::<_, io::Error>(Scripted::destination(frames, first.take().unwrap_or_default()))
    };
    let mut machine = Source { runs: true, relinquished: false };
    let moved = migrate(&config, &mut machine, &mut connect, &mut Silent);
    let committed =
        has_frame(&received.lock().unwrap_or_else(PoisonError::into_inner), kind::COMMIT);
    match moved {
        Ok(_) => assert!(machine.relinquished && !machine.runs && committed),
        Err(SourceFailure { guest: SourceGuest::Runs, .. }) => assert!(machine.runs),
        Err(SourceFailure { guest: SourceGuest::InDoubt(doubt), .. }) => {
            assert!(!machine.runs && !machine.relinquished && committed);
            // It sends the request to the next connection.
            let resolved = doubt.resolve(&mut machine, &mut connect);
            assert_eq!(resolved.is_ok(), machine.runs || machine.relinquished);
        }
        Err(SourceFailure { guest: SourceGuest::Stuck(error), .. }) => panic!("{error}"),
    }
    assert!(!(machine.runs && machine.relinquished));
}

/// True if a frame of `kind` is among those in `bytes`.
fn has_frame(bytes: &[u8], kind: u16) -> bool {
    let mut rest = bytes;
    while let Some((head, behind)) = rest.split_first_chunk::<24>() {
        if u16::from_le_bytes([head[8], head[9]]) == kind {
            return true;
        }
        let len = |at: usize| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(0)
        };
        rest = behind.get(len(12) + len(16)..).unwrap_or_default();
    }
    false
}

/// One frame: mostly the next one of an honest destination.
fn frame(script: &mut Script<'_>, step: u8, honest: &mut u8) -> (u16, Vec<u8>, Vec<u8>) {
    let body = Body::default();
    let (kind, body) = match step {
        0..=6 => {
            *honest += u8::from(*honest < 5);
            match *honest {
                1 => (kind::WELCOME, body.u16(1).u16(0).u32(1)),
                2 => (kind::READY, body),
                3 => (kind::ROUND_DONE, body.u32(0).u32(0).u64(5)),
                4 => (kind::PREPARED, body.u64(3)),
                _ => (kind::RUNNING, body.u64(4)),
            }
        }
        7 => (kind::WELCOME, body.u16(script.u16()).u16(0).u32(script.u16().into())),
        8 => (kind::ROUND_DONE, body.u32(script.u8().into()).u32(0).u64(script.u64())),
        9 => (kind::PREPARED, body.u64(script.u64())),
        10 => (kind::REFUSED, body),
        11 => (kind::ABORT, body.text(script.string())),
        12 => (kind::STATUS, body.u32(u32::from(script.u8()) % 6)),
        13 => (kind::RUNNING, body.u64(script.u64())),
        14 => (kind::READY, body),
        _ => {
            let (kind, body) = (script.u16() % 24, script.string().to_vec());
            return (kind, body, script.string().to_vec());
        }
    };
    (kind, body.0, Vec::new())
}
