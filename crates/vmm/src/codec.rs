//! Encoding of states: `migration::codec`, extended by KVM's structures in the kernel's layout.

use std::ops::{Deref, DerefMut};

use migration::codec;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(crate) use migration::codec::Malformed;

#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn plain<T: IntoBytes + Immutable>(&mut self, value: &T) -> &mut Self {
        self.0.extend_from_slice(value.as_bytes());
        self
    }

    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.plain(&value)
    }

    pub(crate) fn flag(&mut self, value: bool) -> &mut Self {
        self.u8(value.into())
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.plain(&value.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.plain(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.plain(&value.to_le_bytes())
    }

    /// Writes the number of values, then each value.
    pub(crate) fn list<T: IntoBytes + Immutable>(&mut self, values: &[T]) -> &mut Self {
        self.u64(values.len() as u64);
        values.iter().for_each(|value| {
            self.plain(value);
        });
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// The remaining bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(codec::Reader<'a>);

impl<'a> Deref for Reader<'a> {
    type Target = codec::Reader<'a>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Reader<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(codec::Reader::new(bytes))
    }

    pub(crate) fn plain<T: FromBytes>(&mut self) -> Result<T, Malformed> {
        let bytes = self.bytes(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| Malformed::Short)
    }

    /// Reads a list of at most `max` values; the limit is checked before memory is allocated.
    pub(crate) fn list<T: FromBytes>(
        &mut self,
        what: &'static str,
        max: usize,
    ) -> Result<Vec<T>, Malformed> {
        let count = self.u64()?;
        let max = max as u64;
        let known = usize::try_from(count).ok().filter(|_| count <= max);
        let len = known.ok_or(Malformed::TooMany { what, count, max })?;
        if len.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > self.left()) {
            return Err(Malformed::Short);
        }
        (0..len).map(|_| self.plain()).collect()
    }

    /// Checks that no bytes are left.
    pub(crate) const fn finish(self) -> Result<(), Malformed> {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip() {
        let mut writer = Writer::default();
        writer.u8(1).flag(true).u16(2).u32(3).u64(4).list(&[5u64, 6]);
        let bytes = writer.finish();
        let mut reader = Reader::new(&bytes);
        assert_eq!((reader.u8(), reader.flag("flag")), (Ok(1), Ok(true)));
        assert_eq!((reader.u16(), reader.u32(), reader.u64()), (Ok(2), Ok(3), Ok(4)));
        assert_eq!(reader.list::<u64>("numbers", 2), Ok(vec![5, 6]));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn a_list_that_is_too_long_is_refused_before_memory_is_allocated() {
        let list = |bytes: &[u8], max| Reader::new(bytes).list::<u64>("numbers", max);
        let count = u64::MAX.to_le_bytes();
        let too_many = Malformed::TooMany { what: "numbers", count: u64::MAX, max: 9 };
        assert_eq!(list(&count, 9), Err(too_many));
        assert_eq!(list(&count, usize::MAX), Err(Malformed::Short));
        assert_eq!(list(&2u64.to_le_bytes(), 9), Err(Malformed::Short));
        let mut reader = Reader::new(&[2]);
        assert_eq!(reader.flag("it"), Err(Malformed::Value { what: "it", value: 2 }));
        assert_eq!(Reader::new(&[0; 3]).finish(), Err(Malformed::Long { left: 3 }));
    }
}
