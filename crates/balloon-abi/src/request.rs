//! The request queue (`REQUEST_VQ`): what the host asks and the driver answers.
//!
//! ```text
//! request:  id u32 | command u32 | argument u64                        16 bytes
//! answer:   id u32 | outcome u32 | elapsed_ns u64 | values 4 x u64     48 bytes,
//!           then page-bitmap records
//! ```
//!
//! All little-endian. `docs/protocol.md` says what the values mean.

/// Bytes of a request.
pub const REQUEST_BYTES: usize = 16;

/// Bytes of an answer before its records.
pub const ANSWER_HEADER_BYTES: usize = 48;

/// Values in an answer.
pub const ANSWER_VALUES: usize = 4;

/// Requests that a driver holds at most, the running one not counted; one more
/// is answered [`Outcome::Busy`]. A host sends one at a time, and another one
/// only after the time of the first has run out.
pub const MAX_WAITING_REQUESTS: usize = 8;

/// Caches of a guest, as bits (Linux: `/proc/sys/vm/drop_caches`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caches(u64);

impl Caches {
    /// File contents that need not be written back.
    pub const PAGE_CACHE: Self = Self(1);
    /// Reclaimable kernel objects: inodes and directory entries.
    pub const SLAB: Self = Self(2);
    /// Both.
    pub const ALL: Self = Self(3);

    /// The bits as they stand in an argument.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// `None` where no bit is set, or one that has no meaning.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits == 0 || bits & !Self::ALL.0 != 0 { None } else { Some(Self(bits)) }
    }

    /// True when every cache of `other` is in.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What the host asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Drop clean caches.
    DropCaches(Caches),
    /// Name the free blocks of at least `2^min_granule_shift` bytes, as they are
    /// while the driver walks.
    ReportFree {
        /// log2 of the smallest block in bytes.
        min_granule_shift: u32,
    },
    /// Allocate free blocks, name them, and keep them until told otherwise.
    HoldFree {
        /// Balloon pages that the guest keeps free for itself.
        reserve_pages: u64,
    },
    /// Give the blocks of a hold back to the guest.
    ReleaseHold {
        /// Id of the hold's request.
        hold: u32,
    },
    /// Stop the request that has this request's id. Has no answer of its own.
    Cancel,
}

const DROP_CACHES: u32 = 1;
const REPORT_FREE: u32 = 2;
const HOLD_FREE: u32 = 3;
const RELEASE_HOLD: u32 = 4;
const CANCEL: u32 = 5;

/// A command with the id that its answers carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Not 0, and not that of any request that may still be answered.
    pub id: u32,
    /// What is asked.
    pub command: Command,
}

/// Why bytes are no request that can be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// Fewer than [`REQUEST_BYTES`], or the id 0: there is nobody to answer.
    NoRequest,
    /// To be answered [`Outcome::UnknownCommand`].
    UnknownCommand {
        /// Id of the request.
        id: u32,
    },
    /// To be answered [`Outcome::BadArgument`].
    BadArgument {
        /// Id of the request.
        id: u32,
    },
}

impl Request {
    /// The wire form.
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

    /// Reads and checks the wire form.
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

/// How far a request has come, or how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// Records of a request that goes on.
    More = 0,
    /// All is done.
    Done = 1,
    /// Stopped because the host said so.
    Cancelled = 2,
    /// The driver does not know the command.
    UnknownCommand = 3,
    /// The argument has no meaning, or names no hold.
    BadArgument = 4,
    /// The guest's kernel refused; `values[0]` is its error number.
    Failed = 5,
    /// A hold is over: the guest needs the memory.
    HoldLost = 6,
    /// Too many requests wait, or there is a hold already.
    Busy = 7,
}

impl Outcome {
    /// All, by their numbers.
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

    /// `None` for a number that no version defines.
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| *outcome as u32 == number)
    }
}

/// An answer before its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerHeader {
    /// Id of the request.
    pub id: u32,
    /// How far it has come.
    pub outcome: Outcome,
    /// Nanoseconds since the driver began with it.
    pub elapsed_ns: u64,
    /// By command; see `docs/protocol.md`.
    pub values: [u64; ANSWER_VALUES],
}

impl AnswerHeader {
    /// The wire form.
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

    /// Splits a message into header and records; `None` where it is too short or
    /// has an outcome that no version defines.
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
        fn a_request_reads_as_it_was_written(id in 1..=u32::MAX, command in any_command()) {
            let request = Request { id, command };
            prop_assert_eq!(Request::from_bytes(&request.to_bytes()), Ok(request));
        }

        #[test]
        fn an_answer_reads_as_it_was_written(
            id: u32, outcome in 0..8u32, elapsed_ns: u64, values: [u64; 4], records: [u8; 9],
        ) {
            let outcome = Outcome::from_wire(outcome).unwrap();
            let header = AnswerHeader { id, outcome, elapsed_ns, values };
            let mut message = std::vec::Vec::from(header.to_bytes());
            message.extend(records);
            prop_assert_eq!(AnswerHeader::split(&message), Some((header, &records[..])));
        }

        #[test]
        fn bytes_of_any_kind_are_a_request_or_an_error(bytes: [u8; 20], len in 0..20usize) {
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
    fn a_request_without_meaning_is_still_answerable() {
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
    fn the_numbers_are_those_of_the_protocol() {
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
