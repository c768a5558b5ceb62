//! vhost-user messages of a front end.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::EventfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::TEST_TIMEOUT;

/// Requests by number (vhost-user.rst, "Front-end message types").
pub(crate) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const RESET_OWNER: u32 = 4;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
}

/// Version 1, from the front end.
pub(crate) const FLAGS: u32 = 1;
/// Version 1, a reply.
const REPLY_FLAGS: u32 = 5;
/// Feature bit 30: protocol features.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features that the back end offers: MQ, BACKEND_REQ, CONFIG and
/// INFLIGHT_SHMFD, no REPLY_ACK (3).
pub(crate) const OFFERED_PROTOCOL: u64 = 1 | 1 << 5 | 1 << 9 | 1 << 12;
/// A message of the back end on its channel: the configuration changed.
pub(crate) const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The front end's side of a connection.
pub(crate) struct FrontEnd {
    pub(crate) socket: UnixStream,
}

impl FrontEnd {
    pub(crate) fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TEST_TIMEOUT)).unwrap();
        Self { socket }
    }

    /// Sends a message in one piece, like real front ends. Returns false if the back end has
    /// ended the session.
    pub(crate) fn try_send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send_raw(&message(request, FLAGS, payload), fds).is_ok()
    }

    pub(crate) fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(self.try_send(request, payload, fds), "the back end is gone at {request}");
    }

    pub(crate) fn send_u64(&self, request: u32, value: u64) {
        self.send(request, &value.to_ne_bytes(), &[]);
    }

    pub(crate) fn send_state(&self, request: u32, index: u32, value: u32) {
        self.send(request, &words(&[index, value]), &[]);
    }

    /// Sends a queue's file descriptor.
    pub(crate) fn send_fd(&self, request: u32, index: u64, fd: impl AsFd) {
        self.send(request, &index.to_ne_bytes(), &[fd.as_fd()]);
    }

    /// Sends raw bytes.
    pub(crate) fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent =
            sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        (&self.socket).write_all(&bytes[sent..])
    }

    /// Receives the reply to `request` and returns its payload.
    pub(crate) fn reply(&self, request: u32) -> Vec<u8> {
        self.try_reply(request).expect("a reply")
    }

    pub(crate) fn try_reply(&self, request: u32) -> io::Result<Vec<u8>> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header)?;
        let [code, flags, size] = header_words(header);
        assert_eq!((code, flags), (request, REPLY_FLAGS));
        let mut payload = vec![0; size as usize];
        (&self.socket).read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Sends a request whose reply has a file.
    pub(crate) fn request_file(&self, request: u32, payload: &[u8]) -> (Vec<u8>, OwnedFd) {
        self.send(request, payload, &[]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = vec![0; 12 + payload.len()];
        let part = &mut [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(&self.socket, part, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert_eq!(received.bytes, 12 + payload.len(), "sent in one piece");
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let (header, answer) = bytes.split_first_chunk().unwrap();
        assert_eq!(header_words(*header), [request, REPLY_FLAGS, answer.len() as u32]);
        (answer.to_vec(), fd.expect("a file"))
    }

    pub(crate) fn request_u64(&self, request: u32) -> u64 {
        self.send(request, &[], &[]);
        u64::from_ne_bytes(self.reply(request).try_into().unwrap())
    }

    /// Waits until the back end has handled all sent messages.
    pub(crate) fn barrier(&self) {
        self.request_u64(request::GET_FEATURES);
    }

    /// Reads the configuration space from the start, like UML.
    pub(crate) fn read_config(&self, bytes: u32) -> Vec<u8> {
        let mut payload = words(&[0, bytes, 0]);
        payload.resize(12 + bytes as usize, 0);
        self.send(request::GET_CONFIG, &payload, &[]);
        let answer = self.reply(request::GET_CONFIG);
        assert_eq!(answer[..12], payload[..12], "offset, size and flags are repeated");
        assert_eq!(answer.len(), payload.len());
        answer[12..].to_vec()
    }

    pub(crate) fn num_pages(&self) -> u32 {
        u32::from_le_bytes(self.read_config(4).try_into().unwrap())
    }

    pub(crate) fn write_config(&self, offset: u32, data: &[u8]) {
        let size = u32::try_from(data.len()).unwrap();
        let payload = [words(&[offset, size, 0]), data.to_vec()].concat();
        self.send(request::SET_CONFIG, &payload, &[]);
    }

    /// Writes `actual`, as the guest.
    pub(crate) fn write_actual(&self, pages: u32) {
        self.write_config(4, &pages.to_le_bytes());
    }

    /// Shuts down writing; the back end still reads the sent messages.
    pub(crate) fn finish(&self) {
        // The back end may have closed the connection already.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Waits until the back end has closed the connection, and ignores its messages.
    pub(crate) fn wait_closed(&self) {
        let mut rest = Vec::new();
        let _ = (&self.socket).read_to_end(&mut rest);
    }
}

pub(crate) fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [words(&[request, flags, size]), payload.to_vec()].concat()
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn header_words(header: [u8; 12]) -> [u32; 3] {
    let (words, _) = header.as_chunks::<4>();
    [0, 1, 2].map(|i: usize| u32::from_ne_bytes(words[i]))
}

/// Receives the next message on the back end's channel.
pub(crate) fn channel_message(channel: &UnixStream) -> [u32; 3] {
    channel.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let mut header = [0; 12];
    (&*channel).read_exact(&mut header).expect("a message of the back end");
    header_words(header)
}

pub(crate) fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}
