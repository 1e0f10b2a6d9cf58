//! Reading the elements of a tensor as a slice, after its shape, element type and device were checked.

use std::marker::PhantomData;
use std::ops::Deref;

use candle_core::{Storage, StorageRef, Tensor, WithDType};

use crate::{Error, Result};

/// The elements of a contiguous CPU tensor, in row-major order. Holds the tensor's read lock.
pub(crate) struct Elements<'a, T> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
    dtype: PhantomData<T>,
}

impl<'a, T: WithDType> Elements<'a, T> {
    /// Refuses a tensor of another element type or device, and one that is not contiguous.
    pub fn of(op: &'static str, tensor: &'static str, x: &'a Tensor) -> Result<Self> {
        if x.dtype() != T::DTYPE {
            return Err(Error::DType { op, tensor, got: x.dtype(), expected: format!("{:?}", T::DTYPE) });
        }
        let (storage, layout) = x.storage_and_layout();
        if !matches!(&*storage, Storage::Cpu(_)) {
            return Err(Error::Device { op, tensor, got: format!("{:?}", x.device().location()) });
        }
        let Some((start, end)) = layout.contiguous_offsets() else {
            let got = layout.stride().to_vec();
            return Err(Error::Value {
                op,
                name: tensor,
                got: format!("strided {got:?}"),
                expected: "contiguous".into(),
            });
        };
        Ok(Self { storage, start, len: end - start, dtype: PhantomData })
    }
}

impl<T: WithDType> Deref for Elements<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(cpu) => {
                &T::cpu_storage_as_slice(cpu).expect("element type checked by of")[self.start..self.start + self.len]
            }
            _ => unreachable!("device checked by of"),
        }
    }
}

/// Token ids of any shape: u32, contiguous or not.
pub(crate) fn ids(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<Vec<u32>> {
    if x.dtype() != candle_core::DType::U32 {
        return Err(Error::DType { op, tensor, got: x.dtype(), expected: "u32".into() });
    }
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Checks `x` against `expected` dimensions.
pub(crate) fn check_shape(op: &'static str, tensor: &'static str, x: &Tensor, expected: &[usize]) -> Result<()> {
    if x.dims() == expected {
        return Ok(());
    }
    Err(Error::Shape { op, tensor, got: x.dims().to_vec(), expected: format!("{expected:?}") })
}

/// Splits the dimensions of `x` into rows and the width of the last dimension, neither of them 0.
pub(crate) fn rows_and_width(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<(usize, usize)> {
    match x.dims() {
        [rows @ .., width] if x.elem_count() > 0 => Ok((rows.iter().product(), *width)),
        got => Err(Error::Shape { op, tensor, got: got.to_vec(), expected: "[.., width] with elements".into() }),
    }
}
