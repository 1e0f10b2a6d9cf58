//! Matrix products by cuBLASLt: row-major operands, sums in f32, and a matrix that the product is added to. Of the algorithms that have the
//! same bits [`tune`] takes the fastest.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};

use super::{Address, ElementType, tune};
use crate::{Error, Result};

/// A row-major matrix on the device, or its transpose.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub address: Address,
    pub rows: usize,
    pub cols: usize,
    pub dtype: ElementType,
    /// Elements from one row in memory to the next.
    pitch: usize,
    transposed: bool,
    /// What its elements are multiplied by.
    scale: f32,
}

impl Matrix {
    pub fn new(address: Address, dtype: ElementType, rows: usize, cols: usize) -> Self {
        Self { address, rows, cols, dtype, pitch: cols, transposed: false, scale: 1. }
    }

    /// With rows that are this many elements apart in memory.
    pub fn with_pitch(self, pitch: usize) -> Self {
        assert!(!self.transposed && pitch >= self.cols, "rows that do not overlap");
        Self { pitch, ..self }
    }

    /// Times a factor; nothing is computed before the product.
    pub fn times(self, factor: f64) -> Self {
        Self { scale: self.scale * factor as f32, ..self }
    }

    /// The transpose; nothing moves.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }
}

/// `out = a b`, or `out = added + a b` for a matrix of out's size and type, which may be out itself.
///
/// # Safety
/// The addresses are of live allocations of these sizes on the device, `out`'s not among the factors'.
pub(super) unsafe fn product(
    device: &CudaDevice,
    a: Matrix,
    b: Matrix,
    out: Matrix,
    added: Option<Address>,
) -> Result<()> {
    assert!(!out.transposed && (out.rows, a.cols, out.cols) == (a.rows, b.rows, b.cols), "the sizes of a product");
    assert_eq!(a.dtype, b.dtype, "the types of a product's factors");
    let mut devices = DEVICES.get_or_init(Default::default).lock().unwrap_or_else(PoisonError::into_inner);
    let blas = match devices.entry(format!("{:?}", device.id())) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Blas::new(device)?),
    };
    // cuBLAS counts columns first: to it every matrix here is its transpose, and out^T = b^T a^T.
    let added = added.unwrap_or(0);
    let key = Key {
        sizes: [out.cols, out.rows, a.cols],
        strides: [b.pitch, a.pitch, out.pitch],
        transposed: [b.transposed, a.transposed],
        types: [a.dtype, out.dtype],
        adds: added != 0,
        alignments: [b.address, a.address, out.address, added].map(alignment),
    };
    let Blas { handle, workspace, plans } = blas;
    let stream = device.cuda_stream();
    let on = On { handle: *handle, workspace: workspace.device_ptr(&stream).0, stream: stream.cu_stream().cast() };
    let plan = match plans.entry(key) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => {
            let (mut plan, others) = Plan::new(*handle, &key)?;
            tune::choose(&mut plan, &others, &key, on, device)?;
            entry.insert(plan)
        }
    };
    let addresses = [b.address, a.address, if added != 0 { added } else { out.address }, out.address];
    // SAFETY: the plan was made for matrices of these sizes, types and alignments; the caller vouches for the addresses.
    unsafe { plan.run(&plan.algorithm, addresses, a.scale * b.scale, added != 0, on) }
}

/// What a product runs with. The workspace is used by one product at a time, as all are on one stream.
#[derive(Clone, Copy)]
pub(super) struct On {
    handle: sys::cublasLtHandle_t,
    workspace: Address,
    pub stream: *mut c_void,
}

/// Bytes that cuBLASLt may use beside the matrices: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Algorithms that cuBLASLt is asked for.
const CANDIDATES: usize = 16;

static DEVICES: OnceLock<Mutex<HashMap<String, Blas>>> = OnceLock::new();

/// cuBLASLt on one device.
struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    plans: HashMap<Key, Plan>,
}

// SAFETY: a handle and descriptors may be used from any thread; the mutex around them lets one thread at a time.
unsafe impl Send for Blas {}

/// What decides how a product is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// m, n and k as cuBLAS has them.
    pub sizes: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    /// Of the factors, of the product.
    pub types: [ElementType; 2],
    pub adds: bool,
    alignments: [u32; 4],
}

impl Key {
    /// Elements that the two factors and the product take in memory, with what lies between their rows.
    pub fn elements(&self) -> [usize; 3] {
        let ([m, n, k], [b_pitch, a_pitch, out_pitch], [b_turned, a_turned]) =
            (self.sizes, self.strides, self.transposed);
        [if b_turned { m } else { k } * b_pitch, if a_turned { k } else { n } * a_pitch, n * out_pitch]
    }
}

/// A product's descriptors and algorithm. They are kept for the life of the process: a model has a few dozen.
pub(super) struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    pub algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(error: result::CublasError) -> Error {
    candle_core::Error::Msg(format!("a matrix product failed: {error}")).into()
}

/// The largest power of two, up to what cuBLAS can use, that divides an address.
fn alignment(address: Address) -> u32 {
    1 << address.trailing_zeros().min(8)
}

impl Blas {
    fn new(device: &CudaDevice) -> Result<Self> {
        // SAFETY: a workspace is written before it is read.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE)? };
        Ok(Self { handle: result::create_handle().map_err(failed)?, workspace, plans: HashMap::new() })
    }
}

impl Plan {
    /// With the algorithm that cuBLASLt thinks the best, and the others that it names.
    fn new(handle: sys::cublasLtHandle_t, key: &Key) -> Result<(Self, Vec<sys::cublasLtMatmulAlgo_t>)> {
        let data_type = |dtype| match dtype {
            ElementType::F32 => sys::cudaDataType::CUDA_R_32F,
            ElementType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let ([m, n, k], [b_stride, a_stride, out_stride]) = (key.sizes, key.strides);
        let layout = |dtype, transposed, rows: usize, cols: usize, stride: usize| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            result::create_matrix_layout(data_type(dtype), rows as u64, cols as u64, stride as i64).map_err(failed)
        };
        let [factors, product] = key.types;
        let b = layout(factors, key.transposed[0], m, k, b_stride)?;
        let a = layout(factors, key.transposed[1], k, n, a_stride)?;
        let out = layout(product, false, m, n, out_stride)?;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(failed)?;
        let preference = result::create_matmul_pref().map_err(failed)?;
        use sys::{cublasLtMatmulDescAttributes_t as Of, cublasLtMatmulPreferenceAttributes_t as Prefer};
        let transposed = key.transposed.map(i32::from);
        // SAFETY: every attribute is given a value of the type that cuBLASLt documents for it, of that size.
        unsafe {
            for (which, value) in
                [(Of::CUBLASLT_MATMUL_DESC_TRANSA, transposed[0]), (Of::CUBLASLT_MATMUL_DESC_TRANSB, transposed[1])]
            {
                result::set_matmul_desc_attribute(operation, which, (&raw const value).cast(), 4).map_err(failed)?;
            }
            let bytes = WORKSPACE as u64;
            let which = Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, which, (&raw const bytes).cast(), 8).map_err(failed)?;
            let [b_bytes, a_bytes, out_bytes, added_bytes] = key.alignments;
            for (which, value) in [
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b_bytes),
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a_bytes),
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, added_bytes.min(out_bytes)),
                (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_bytes),
            ] {
                result::set_matmul_pref_attribute(preference, which, (&raw const value).cast(), 4).map_err(failed)?;
            }
            let mut found = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); CANDIDATES];
            let mut n = 0;
            let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                operation,
                b,
                a,
                out,
                out,
                preference,
                CANDIDATES as c_int,
                found.as_mut_ptr().cast(),
                &mut n,
            );
            result::destroy_matmul_pref(preference).map_err(failed)?;
            asked.result().map_err(failed)?;
            let found = found[..n as usize].iter().map(|found| found.assume_init_ref());
            let mut found =
                found.filter(|found| found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS).map(|found| found.algo);
            let unsupported = result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
            let algorithm = found.next().ok_or_else(|| failed(unsupported))?;
            Ok((Self { operation, a, b, out, algorithm }, found.collect()))
        }
    }

    /// Addresses of b, a, what is added and out, as cuBLAS has them, and the factor on the product.
    ///
    /// # Safety
    /// As for [`product`]; of the sizes and alignments that the plan was made for.
    pub unsafe fn run(
        &self,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        at: [Address; 4],
        factor: f32,
        adds: bool,
        on: On,
    ) -> Result<()> {
        let beta = if adds { 1f32 } else { 0. };
        let [b, a, c, out] = at.map(|address| address as *mut c_void);
        // SAFETY: by this function's own demands.
        unsafe {
            result::matmul(
                on.handle,
                self.operation,
                (&raw const factor).cast(),
                (&raw const beta).cast(),
                b,
                self.b,
                a,
                self.a,
                c,
                self.out,
                out,
                self.out,
                algorithm,
                on.workspace as *mut c_void,
                WORKSPACE,
                on.stream.cast(),
            )
        }
        .map_err(failed)
    }
}
