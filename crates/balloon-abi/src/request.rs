//! The request queue (`REQUEST_VQ`): requests of the host and answers of the driver.
//!
//! ```text
//! request:  id u32 | command u32 | argument u64                        16 bytes
//! answer:   id u32 | outcome u32 | elapsed_ns u64 | values 4 x u64     48 bytes,
//!           then page-bitmap records
//! ```
//!
//! All little-endian. `docs/protocol.md` defines the values.

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 16;

/// Bytes of an answer before its records.
pub const ANSWER_HEADER_BYTES: usize = 48;

/// Values in an answer.
pub const ANSWER_VALUES: usize = 4;

/// Most requests that wait in a driver, without the running one. It answers one more with
/// [`Outcome::Busy`]. A host sends one at a time, and another one only after the first has
/// ended or timed out.
pub const MAX_WAITING_REQUESTS: usize = 8;

/// Caches of a guest as bits, as in Linux's `/proc/sys/vm/drop_caches`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caches(u64);

impl Caches {
    /// Clean page cache.
    pub const PAGE_CACHE: Self = Self(1);
    /// Reclaimable kernel objects: inodes and directory entries.
    pub const SLAB: Self = Self(2);
    /// Both.
    pub const ALL: Self = Self(3);

    /// Returns the bits of the wire argument.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns `None` if no bit or an unknown bit is set.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits == 0 || bits & !Self::ALL.0 != 0 { None } else { Some(Self(bits)) }
    }

    /// Returns true if it includes every cache of `other`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A command of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Drop clean caches.
    DropCaches(Caches),
    /// Report blocks of at least `2^min_granule_shift` bytes that are free during the scan.
    ReportFree {
        /// log2 of the smallest block in bytes.
        min_granule_shift: u32,
    },
    /// Allocate free blocks, report them, and keep them until the release.
    HoldFree {
        /// Balloon pages that the guest leaves free for its own use.
        reserve_pages: u64,
    },
    /// Free the blocks of a hold.
    ReleaseHold {
        /// Id of the hold's request.
        hold: u32,
    },
    /// Cancel the request with this id. Has no answer of its own.
    Cancel,
}

const DROP_CACHES: u32 = 1;
const REPORT_FREE: u32 = 2;
const HOLD_FREE: u32 = 3;
const RELEASE_HOLD: u32 = 4;
const CANCEL: u32 = 5;

/// A command with an id, which its answers repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Not 0, and not the id of a request that may still be answered.
    pub id: u32,
    /// The command.
    pub command: Command,
}

/// Why a request cannot be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// Fewer than [`REQUEST_BYTES`], or the id 0. Gets no answer.
    NoRequest,
    /// Must be answered with [`Outcome::UnknownCommand`].
    UnknownCommand {
        /// Id of the request.
        id: u32,
    },
    /// Must be answered with [`Outcome::BadArgument`].
    BadArgument {
        /// Id of the request.
        id: u32,
    },
}

impl Request {
    /// Returns the wire format.
    pub fn to_bytes(self) -> [u8; REQUEST_BYTES] {
        let (command, argument) = match self.command {
            Command::DropCaches(caches) => (DROP_CACHES, caches.bits()),
            Command::ReportFree { min_granule_shift } => (REPORT_FREE, min_granule_shift.into()),
            Command::HoldFree { reserve_pages } => (HOLD_FREE, reserve_pages),
            Command::ReleaseHold { hold } => (RELEASE_HOLD, hold.into()),
            Command::Cancel => (CANCEL, 0),
        };
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0..4].copy_from_slice(&self.id.to_le_bytes());
        bytes[4..8].copy_from_slice(&command.to_le_bytes());
        bytes[8..16].copy_from_slice(&argument.to_le_bytes());
        bytes
    }

    /// Decodes and checks the wire format.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RequestError> {
        let mut fields = Fields(bytes);
        let (Some(id), Some(command), Some(argument)) = (fields.u32(), fields.u32(), fields.u64())
        else {
            return Err(RequestError::NoRequest);
        };
        if id == 0 {
            return Err(RequestError::NoRequest);
        }
        let bad = RequestError::BadArgument { id };
        let command = match command {
            DROP_CACHES => Command::DropCaches(Caches::from_bits(argument).ok_or(bad)?),
            REPORT_FREE => {
                let shifts = crate::limits::MIN_GRANULE_SHIFT..=crate::limits::MAX_GRANULE_SHIFT;
                let shift = u32::try_from(argument).map_err(|_| bad)?;
                if !shifts.contains(&shift) {
                    return Err(bad);
                }
                Command::ReportFree { min_granule_shift: shift }
            }
            HOLD_FREE => Command::HoldFree { reserve_pages: argument },
            RELEASE_HOLD => {
                Command::ReleaseHold { hold: u32::try_from(argument).map_err(|_| bad)? }
            }
            CANCEL => Command::Cancel,
            _ => return Err(RequestError::UnknownCommand { id }),
        };
        Ok(Self { id, command })
    }
}

/// Progress or outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// A partial answer; the request is still running.
    More = 0,
    /// The request is complete.
    Done = 1,
    /// The host cancelled the request.
    Cancelled = 2,
    /// The driver does not support the command.
    UnknownCommand = 3,
    /// The argument is invalid, or names no hold.
    BadArgument = 4,
    /// The guest's kernel failed; `values[0]` is its error number.
    Failed = 5,
    /// The guest needed the memory of the hold.
    HoldLost = 6,
    /// Too many requests are waiting, or there is a hold already.
    Busy = 7,
}

impl Outcome {
    /// All outcomes, in order of their wire values.
    pub const ALL: [Self; 8] = [
        Self::More,
        Self::Done,
        Self::Cancelled,
        Self::UnknownCommand,
        Self::BadArgument,
        Self::Failed,
        Self::HoldLost,
        Self::Busy,
    ];

    /// Decodes a wire value; `None` if it is undefined.
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| *outcome as u32 == number)
    }
}

/// An answer before its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerHeader {
    /// Id of the request.
    pub id: u32,
    /// Progress or outcome.
    pub outcome: Outcome,
    /// Nanoseconds since the driver started the request.
    pub elapsed_ns: u64,
    /// Values by command; see `docs/protocol.md`.
    pub values: [u64; ANSWER_VALUES],
}

impl AnswerHeader {
    /// Returns the wire format.
    pub fn to_bytes(self) -> [u8; ANSWER_HEADER_BYTES] {
        let mut bytes = [0; ANSWER_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.id.to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.outcome as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.elapsed_ns.to_le_bytes());
        let (slots, _) = bytes[16..].as_chunks_mut::<8>();
        for (slot, value) in slots.iter_mut().zip(self.values) {
            *slot = value.to_le_bytes();
        }
        bytes
    }

    /// Splits a message into header and records; `None` if it is too short or its outcome is
    /// undefined.
    pub fn split(message: &[u8]) -> Option<(Self, &[u8])> {
        let (header, records) = message.split_at_checked(ANSWER_HEADER_BYTES)?;
        let mut fields = Fields(header);
        let (id, outcome) = (fields.u32()?, Outcome::from_wire(fields.u32()?)?);
        let elapsed_ns = fields.u64()?;
        let mut values = [0; ANSWER_VALUES];
        for value in &mut values {
            *value = fields.u64()?;
        }
        Some((Self { id, outcome, elapsed_ns, values }, records))
    }
}

/// Reads little-endian numbers one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (raw, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*raw))
    }

    fn u64(&mut self) -> Option<u64> {
        let (raw, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*raw))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    fn any_command() -> impl Strategy<Value = Command> {
        prop_oneof![
            (1..=3u64).prop_map(|bits| Command::DropCaches(Caches::from_bits(bits).unwrap())),
            (12..=30u32).prop_map(|min_granule_shift| Command::ReportFree { min_granule_shift }),
            any::<u64>().prop_map(|reserve_pages| Command::HoldFree { reserve_pages }),
            any::<u32>().prop_map(|hold| Command::ReleaseHold { hold }),
            Just(Command::Cancel),
        ]
    }

    proptest! {
        #[test]
        fn decoding_a_request_inverts_encoding(id in 1..=u32::MAX, command in any_command()) {
            let request = Request { id, command };
            prop_assert_eq!(Request::from_bytes(&request.to_bytes()), Ok(request));
        }

        #[test]
        fn decoding_an_answer_inverts_encoding(
            id: u32, outcome in 0..8u32, elapsed_ns: u64, values: [u64; 4], records: [u8; 9],
        ) {
            let outcome = Outcome::from_wire(outcome).unwrap();
            let header = AnswerHeader { id, outcome, elapsed_ns, values };
            let mut message = std::vec::Vec::from(header.to_bytes());
            message.extend(records);
            prop_assert_eq!(AnswerHeader::split(&message), Some((header, &records[..])));
        }

        #[test]
        fn any_bytes_are_a_request_or_an_error(bytes: [u8; 20], len in 0..20usize) {
            match Request::from_bytes(&bytes[..len]) {
                Ok(request) => prop_assert!(request.id != 0 && len >= REQUEST_BYTES),
                Err(RequestError::NoRequest) => {}
                Err(RequestError::UnknownCommand { id } | RequestError::BadArgument { id }) => {
                    prop_assert_eq!(&id.to_le_bytes()[..], &bytes[..4]);
                }
            }
            let _ = AnswerHeader::split(&bytes[..len]);
        }
    }

    #[test]
    fn an_invalid_request_can_be_answered() {
        let with = |command: u32, argument: u64| {
            let mut bytes = [0; REQUEST_BYTES];
            bytes[0] = 7;
            bytes[4..8].copy_from_slice(&command.to_le_bytes());
            bytes[8..].copy_from_slice(&argument.to_le_bytes());
            Request::from_bytes(&bytes)
        };
        for (command, argument) in
            [(1, 0), (1, 4), (1, 1 << 32 | 1), (2, 11), (2, 31), (4, 1 << 32)]
        {
            assert_eq!(with(command, argument), Err(RequestError::BadArgument { id: 7 }));
        }
        for command in [0, 6, u32::MAX] {
            assert_eq!(with(command, 1), Err(RequestError::UnknownCommand { id: 7 }));
        }
    }

    #[test]
    fn the_wire_values_are_those_of_the_protocol() {
        let request =
            Request { id: 0x0403_0201, command: Command::HoldFree { reserve_pages: 0x0807 } };
        let expected = [1, 2, 3, 4, 3, 0, 0, 0, 7, 8, 0, 0, 0, 0, 0, 0];
        assert_eq!(request.to_bytes(), expected);
        for (number, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, number);
        }
        assert_eq!(Outcome::from_wire(8), None);
    }
}
