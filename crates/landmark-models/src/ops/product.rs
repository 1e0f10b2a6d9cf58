//! Matrix products through the `gemm` crate, straight into memory that nobody zeroed first.

use super::math::Real;

/// A matrix in a slice: row-major, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// The row-major matrix `[rows, cols]`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix of {rows} x {cols}");
        Self { data, rows, cols, transposed: false }
    }

    /// The transpose; nothing moves.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    fn strides(&self) -> (isize, isize) {
        if self.transposed { (1, self.rows as isize) } else { (self.cols as isize, 1) }
    }
}

/// `a b`, row-major.
pub(crate) fn product<T: Real>(a: Matrix<T>, b: Matrix<T>) -> Vec<T> {
    let mut out = Vec::with_capacity(a.rows * b.cols);
    // SAFETY: the capacity is the product's size, and `raw` writes all of it before the length says so.
    unsafe {
        raw(out.as_mut_ptr(), false, a, b);
        out.set_len(a.rows * b.cols);
    }
    out
}

/// `out = a b`.
pub(crate) fn product_into<T: Real>(out: &mut [T], a: Matrix<T>, b: Matrix<T>) {
    assert_eq!(out.len(), a.rows * b.cols, "the product's size");
    // SAFETY: `out` is a slice of the product's size.
    unsafe { raw(out.as_mut_ptr(), false, a, b) }
}

/// `out += a b`.
pub(crate) fn add_product<T: Real>(out: &mut [T], a: Matrix<T>, b: Matrix<T>) {
    assert_eq!(out.len(), a.rows * b.cols, "the product's size");
    // SAFETY: `out` is an initialised slice of the product's size.
    unsafe { raw(out.as_mut_ptr(), true, a, b) }
}

/// # Safety
/// `out` points to `a.rows * b.cols` elements, initialised if `accumulate`, that nobody else touches.
unsafe fn raw<T: Real>(out: *mut T, accumulate: bool, a: Matrix<T>, b: Matrix<T>) {
    assert_eq!(a.cols, b.rows, "the inner dimension of a product");
    let ((a_row, a_col), (b_row, b_col)) = (a.strides(), b.strides());
    // SAFETY: the caller vouches for `out`; a `Matrix` spans exactly its slice, with these strides.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            1,
            b.cols as isize,
            accumulate,
            a.data.as_ptr(),
            a_col,
            a_row,
            b.data.as_ptr(),
            b_col,
            b_row,
            T::one(),
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        )
    }
}
