//! The structs of `params.h`: what crosses the boundary between Rust and CUDA.

use std::ffi::{c_char, c_int, c_void};

/// Slots of a unit, and of its groups.
pub const GROUPS: usize = 8;
pub const UNIT: usize = 64;
pub const GROUP: usize = UNIT / GROUPS;

/// Flags of a group.
pub const SEGMENT_END: u8 = 1;
pub const LANDMARK: u8 = 2;

/// Long blocks whose statistics are held at once.
pub const LONG_BLOCKS_AT_ONCE: usize = 16;
/// Rows are padded to a multiple of this.
pub const ROWS: usize = 128;

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Group {
    pub start: i32,
    pub count: u8,
    pub flags: u8,
    pub hidden: u8,
    pub reserved: u8,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Unit {
    pub groups: [Group; GROUPS],
    pub first_key: i32,
    pub last_key: i32,
    pub long_block: i32,
    pub landmark: i32,
    pub part_first: i32,
    pub part_last: i32,
}

/// What Hopper's kernels work on: a block, landmark included, or a piece of a block that no query is behind: `n` is [`BEYOND`], its keys
/// are the next 63.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Block {
    pub start: i32,
    pub n: i32,
}

pub const BEYOND: i32 = 1 << 30;

/// Of 64 queries in turn: how many blocks one of them sees, and how many all of them are behind.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct View {
    pub seen: i32,
    pub behind: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Strides {
    pub batch: i64,
    pub head: i64,
    pub step: i64,
}

#[repr(i32)]
#[derive(Debug, Clone, Copy)]
pub enum ElementType {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
}

/// Thresholds of hashes, and what is kept is multiplied by.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    pub seed_low: u32,
    pub seed_high: u32,
    pub weights: u32,
    pub groups: u32,
    pub weights_kept: f32,
    pub groups_kept: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Params {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub dout: u64,
    pub out: u64,
    pub lse: u64,
    pub dq: u64,
    pub dk: u64,
    pub dv: u64,
    pub rows: u64,
    pub stats: u64,
    pub units: u64,
    pub first_unit: u64,
    pub blocks: u64,
    pub views: u64,
    pub q_strides: Strides,
    pub k_strides: Strides,
    pub v_strides: Strides,
    pub dout_strides: Strides,
    pub batch: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub q_len: i32,
    pub kv_len: i32,
    pub head_dim: i32,
    pub q_pad: i32,
    pub max_units: i32,
    pub max_long_blocks: i32,
    pub block: i32,
    pub block_stride: i32,
    pub dtype: ElementType,
    pub scale: f32,
    pub reserved: i32,
    pub dropout: Dropout,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Splits {
    pub first: u64,
    pub out: u64,
    pub lse: u64,
    pub count: i32,
    pub reserved: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RopeParams {
    pub x: u64,
    pub out: u64,
    pub table: u64,
    pub strides: Strides,
    pub batch: i32,
    pub heads: i32,
    pub time: i32,
    pub pairs: i32,
    pub per_row: i32,
    pub halves: i32,
    pub dtype: ElementType,
    pub sign: f32,
}

#[repr(i32)]
#[derive(Debug, Clone, Copy)]
pub enum BlockSelection {
    PerTokenAndHead = 0,
    MaxOverHeads = 1,
    MaxOverTokens = 2,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RetrievalParams {
    pub queries: u64,
    pub keys: u64,
    pub values: u64,
    pub landmarks: u64,
    pub lengths: u64,
    pub chosen: u64,
    pub out: u64,
    pub lse: u64,
    pub scores: u64,
    pub frames: u64,
    pub batch: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub time: i32,
    pub head_dim: i32,
    pub block: i32,
    pub capacity: i32,
    pub first: i32,
    pub len: i32,
    pub newest: i32,
    pub k: i32,
    pub selection: BlockSelection,
    pub dtype: ElementType,
    pub scale_log2: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PlaceParams {
    pub units: u64,
    pub frames: u64,
    pub keys: u64,
    pub values: u64,
    pub part_bytes: i64,
    pub count: i32,
    pub reserved: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct JoinParams {
    pub a: u64,
    pub b: u64,
    pub out: u64,
    pub a_lse: u64,
    pub b_lse: u64,
    pub lse: u64,
    pub rows: i64,
    pub head_dim: i32,
    pub dtype: ElementType,
}

const _: () = assert!(size_of::<Group>() == 8 && size_of::<Unit>() == 88 && size_of::<Strides>() == 24);
const _: () = assert!(size_of::<Block>() == 8 && size_of::<Params>() == 296);
const _: () = assert!(size_of::<RopeParams>() == 80 && size_of::<RetrievalParams>() == 136);
const _: () = assert!(size_of::<PlaceParams>() == 48 && size_of::<JoinParams>() == 64 && size_of::<Splits>() == 32);

unsafe extern "C" {
    pub fn landmark_attention_forward(params: *const Params, stream: *mut c_void) -> c_int;
    pub fn landmark_attention_forward_split(params: *const Params, splits: *const Splits, stream: *mut c_void)
    -> c_int;
    pub fn landmark_attention_backward(params: *const Params, stream: *mut c_void) -> c_int;
    pub fn landmark_rope(params: *const RopeParams, stream: *mut c_void) -> c_int;
    /// Numbers of f32 that `landmark_select` works in.
    pub fn landmark_select_scratch(params: *const RetrievalParams) -> i64;
    pub fn landmark_select(params: *const RetrievalParams, scratch: u64, stream: *mut c_void) -> c_int;
    pub fn landmark_attend(params: *const RetrievalParams, stream: *mut c_void) -> c_int;
    pub fn landmark_place(params: *const PlaceParams, stream: *mut c_void) -> c_int;
    pub fn landmark_join(params: *const JoinParams, stream: *mut c_void) -> c_int;
    pub fn landmark_attention_error(error: c_int) -> *const c_char;
}
