//! Numbers, strings and bytes in their order, as they come from whoever may have sent anything:
//! bodies of frames, files, and the forms of a monitor's own. All little-endian.

use crate::error::MigrationError;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Something is missing at the end.
    #[error("it ends too early")]
    Short,
    /// Nobody knows what the last bytes are.
    #[error("{left} bytes are left over")]
    Long {
        /// So many.
        left: usize,
    },
    /// More than there can be.
    #[error("{count} {what}, of which there can be {max}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are said to be.
        count: u64,
        /// How many there can be.
        max: u64,
    },
    /// A number that means nothing here.
    #[error("{what} cannot be {value:#x}")]
    Value {
        /// What it is.
        what: &'static str,
        /// What it is said to be.
        value: u64,
    },
    /// Bytes without a meaning have one.
    #[error("a reserved byte is not 0")]
    Reserved,
    /// A string that is no printable ASCII.
    #[error("a name is no printable ASCII")]
    Text,
}

/// In a message, it is the peer's fault.
impl From<Malformed> for MigrationError {
    fn from(error: Malformed) -> Self {
        let what = match error {
            Malformed::Short => "a message is shorter than it must be",
            Malformed::Long { .. } | Malformed::TooMany { .. } => {
                "a message is longer than it may be"
            }
            Malformed::Value { what, .. } => what,
            Malformed::Reserved => "a reserved byte is not 0",
            Malformed::Text => "a name is no printable ASCII",
        };
        Self::Peer { what }
    }
}

/// What is left to read. Every call takes what it returns, or fails and takes nothing that counts.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

type Read<T> = Result<T, Malformed>;

impl<'a> Reader<'a> {
    /// Reads these from their start to their end.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// How many bytes are left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.rest.len()
    }

    /// So many bytes as they are.
    ///
    /// # Errors
    /// There are fewer, as for all that follow.
    pub fn bytes(&mut self, len: usize) -> Read<&'a [u8]> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// So many bytes.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(*bytes)
    }

    /// A number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u8(&mut self) -> Read<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u16(&mut self) -> Read<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// A number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// A number.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// 0 or 1.
    ///
    /// # Errors
    /// [`Malformed::Value`], and as [`bytes`](Self::bytes).
    pub fn flag(&mut self, what: &'static str) -> Read<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(Malformed::Value { what, value: value.into() }),
        }
    }

    /// A number of things, at most `most`, which is asked before there is room for them.
    pub(crate) fn count(&mut self, most: usize) -> Read<usize> {
        let count = self.u32()?;
        let max = most as u64;
        let known = usize::try_from(count).ok().filter(|count| *count <= most);
        known.ok_or(Malformed::TooMany { what: "things", count: count.into(), max })
    }

    /// Bytes that have no meaning yet.
    pub(crate) fn reserved(&mut self, len: usize) -> Read<()> {
        let zeros = self.bytes(len)?.iter().all(|byte| *byte == 0);
        if zeros { Ok(()) } else { Err(Malformed::Reserved) }
    }

    /// A string of at most `most` bytes behind its length.
    pub(crate) fn text(&mut self, most: usize) -> Read<String> {
        let len = self.count(most)?;
        let bytes = self.bytes(len)?;
        if !bytes.iter().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(Malformed::Text);
        }
        Ok(bytes.iter().copied().map(char::from).collect())
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// [`Malformed::Long`].
    pub const fn finish(self) -> Read<()> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Malformed::Long { left }),
        }
    }
}

/// Writes a body.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A number of things, which the caller keeps within its limit.
    pub(crate) fn count(self, count: usize) -> Self {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// A string of at most `most` bytes, cut there, with everything but printable ASCII as `?`.
    pub(crate) fn text(self, text: &str, most: usize) -> Self {
        let printable = |byte: u8| if matches!(byte, b' '..=b'~') { byte } else { b'?' };
        let bytes: Vec<u8> = text.bytes().take(most).map(printable).collect();
        self.count(bytes.len()).bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_or_refused() {
        let bytes = Writer::default().u8(1).u16(2).u32(3).u64(4).text("five", 9).0;
        let mut reader = Reader::new(&bytes);
        assert_eq!((reader.flag("it"), reader.u16(), reader.u32()), (Ok(true), Ok(2), Ok(3)));
        assert_eq!((reader.u64(), reader.text(9)), (Ok(4), Ok("five".to_owned())));
        assert_eq!(reader.finish(), Ok(()));
        assert_eq!(Reader::new(&[2]).flag("it"), Err(Malformed::Value { what: "it", value: 2 }));
        assert_eq!(Reader::new(&[0; 3]).finish(), Err(Malformed::Long { left: 3 }));
        assert_eq!(Reader::new(&[0; 3]).u32(), Err(Malformed::Short));
        assert_eq!(Reader::new(&[0, 1]).reserved(2), Err(Malformed::Reserved));
        assert_eq!(Reader::new(&[1, 0, 0, 0, 7]).text(1), Err(Malformed::Text));
        let many = Malformed::TooMany { what: "things", count: 0xffff_ffff, max: 9 };
        assert_eq!(Reader::new(&[0xff; 4]).count(9), Err(many));
    }
}
