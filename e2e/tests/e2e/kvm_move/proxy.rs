//! A network that breaks in the moment in which a guest changes sides.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

/// A frame's head (docs/migration.md), and where its kind and the lengths of body and payload are.
const HEAD_BYTES: usize = 24;
const KIND: usize = 8;
const BODY: usize = 12;
const PAYLOAD: usize = 16;

/// What a destination says when it has all of the guest.
const PREPARED: u16 = 12;

/// Passes connections on to `to`; returns where it listens. On the first one on which a guest was
/// *prepared*, the source hears that, and nothing it says afterwards arrives; then the connection
/// is closed. Later connections are whole.
pub(super) fn loses_the_hand_over(to: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let to = to.to_owned();
    thread::spawn(move || {
        let mut lost = false;
        while let Ok((source, _)) = listener.accept() {
            // The destination may be dead by then.
            let Ok(destination) = TcpStream::connect(&to) else { continue };
            let (from, back) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
            let there = thread::spawn(move || pass(from, destination));
            if lost {
                pass(back, source);
            } else {
                lost = pass_until_prepared(back, source);
            }
            there.join().unwrap();
        }
    });
    address
}

/// Until either side closes.
fn pass(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    close(&from);
    close(&to);
}

/// Frame by frame; true where the guest was prepared.
fn pass_until_prepared(mut from: TcpStream, mut to: TcpStream) -> bool {
    let mut frame = [0; HEAD_BYTES].to_vec();
    while from.read_exact(&mut frame).is_ok() {
        let length = |at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().unwrap()) as usize;
        let kind = u16::from_le_bytes(frame[KIND..KIND + 2].try_into().unwrap());
        frame.resize(HEAD_BYTES + length(BODY) + length(PAYLOAD), 0);
        if from.read_exact(&mut frame[HEAD_BYTES..]).is_err() {
            break;
        }
        if kind == PREPARED {
            // What the source says to this cannot be passed on, and closes its end.
            close(&from);
        }
        if to.write_all(&frame).is_err() || kind == PREPARED {
            return kind == PREPARED;
        }
        frame.resize(HEAD_BYTES, 0);
    }
    close(&from);
    close(&to);
    false
}

/// One that is closed already is closed.
fn close(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}
