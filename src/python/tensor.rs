//! Torch tensors in and out. The only place that touches libtorch's memory.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::{Deref, Range};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use tch::{Device, Kind, Tensor};

use super::error::from_torch;
use crate::error::{Error, Result};
use crate::kernel::{View, ViewMut4};

/// A `torch.Tensor` argument or return value.
pub(super) struct PyTensor(pub Tensor);

impl<'py> FromPyObject<'_, 'py> for PyTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        // SAFETY: the pointer belongs to a live Python object, borrowed for this call, and the GIL is held.
        let tensor = unsafe { Tensor::pyobject_unpack(object.as_ptr().cast()) }.map_err(from_torch)?;
        let tensor = tensor.ok_or_else(|| {
            let name =
                object.get_type().name().map_or_else(|_| "unknown".to_owned(), |name| name.to_string());
            PyTypeError::new_err(format!("expected a torch.Tensor, got {name}"))
        })?;
        Ok(PyTensor(tensor))
    }
}

impl<'py> IntoPyObject<'py> for PyTensor {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let object = self.0.pyobject_wrap().map_err(from_torch)?;
        // SAFETY: libtorch returns a new reference to a Python object (or null with an exception set), which we take over.
        unsafe { Bound::from_owned_ptr_or_err(py, object.cast()) }
    }
}

impl PyTensor {
    /// The tensor, for work without the GIL.
    pub(super) fn as_ref(&self) -> TensorRef<'_> {
        TensorRef(&self.0)
    }
}

/// A borrowed tensor that is only read: its shape, strides, dtype and memory.
#[derive(Clone, Copy)]
pub(super) struct TensorRef<'a>(&'a Tensor);

// SAFETY: `Tensor` is a pointer to libtorch's reference-counted tensor, whose const methods may be called from any thread; nothing
// here changes it, and none of those methods need the GIL.
unsafe impl Send for TensorRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorRef<'_> {}

impl<'a> TensorRef<'a> {
    /// The tensor, for as long as it is borrowed.
    pub(super) fn tensor(self) -> &'a Tensor {
        self.0
    }
}

impl Deref for TensorRef<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        self.0
    }
}

/// The torch name of a dtype, for messages.
pub(super) fn dtype_name(kind: Kind) -> String {
    match kind {
        Kind::Float => "torch.float32".into(),
        Kind::Double => "torch.float64".into(),
        Kind::BFloat16 => "torch.bfloat16".into(),
        Kind::Half => "torch.float16".into(),
        Kind::Bool => "torch.bool".into(),
        Kind::Int64 => "torch.int64".into(),
        other => format!("{other:?}"),
    }
}

/// Rust types that a torch dtype stores, bit for bit.
pub(super) trait Stored: Copy {
    const KIND: Kind;
}

macro_rules! stored {
    ($($type:ty => $kind:ident),+ $(,)?) => { $(impl Stored for $type { const KIND: Kind = Kind::$kind; })+ };
}
// Booleans are read as bytes: torch promises 0 or 1 but does not enforce it.
stored!(f32 => Float, f64 => Double, half::bf16 => BFloat16, half::f16 => Half, i64 => Int64, u8 => Bool);

/// The shape of a strided tensor, on any device, if it has the dtype and the rank that are expected.
pub(super) fn check_strided<const RANK: usize>(
    name: &str,
    tensor: &Tensor,
    kind: Kind,
) -> Result<[usize; RANK]> {
    if tensor.is_sparse() || tensor.is_mkldnn() {
        return Err(Error::Value(format!("{name}: expected a strided tensor, got another layout")));
    }
    if tensor.kind() != kind {
        let (expected, got) = (dtype_name(kind), dtype_name(tensor.kind()));
        return Err(Error::Dtype(format!("{name}: expected dtype {expected}, got {got}")));
    }
    let size: Vec<usize> = tensor.size().iter().map(|&side| side as usize).collect();
    size.try_into().map_err(|size: Vec<usize>| {
        Error::Shape(format!("{name}: expected {RANK} dimensions, got shape {size:?}"))
    })
}

fn check_on_cpu(name: &str, tensor: &Tensor) -> Result<()> {
    if tensor.device() == Device::Cpu {
        return Ok(());
    }
    Err(Error::Device(format!("{name}: expected a CPU tensor, got one on another device")))
}

/// Read access to a tensor's elements with whatever strides it has.
pub(super) fn view<'a, T: Stored, const RANK: usize>(
    name: &str,
    tensor: &'a Tensor,
) -> Result<View<'a, T, RANK>> {
    check_on_cpu(name, tensor)?;
    let shape = check_strided::<RANK>(name, tensor, T::KIND)?;
    let strides = tensor.stride();
    let strides: [i64; RANK] = std::array::from_fn(|axis| strides[axis]);
    // The last element reachable through torch's non-negative strides. Torch keeps it inside the tensor's storage.
    let span = if shape.contains(&0) {
        0
    } else {
        1 + shape.iter().zip(strides).map(|(&side, stride)| (side - 1) * stride as usize).sum::<usize>()
    };
    // SAFETY: `data_ptr` points at the tensor's first element; torch guarantees that every element reachable by its sizes and
    // strides, `span` of them from there, is allocated; the tensor is borrowed for 'a and holds its storage.
    unsafe { View::from_raw_parts(name, tensor.data_ptr().cast(), span, 0, shape, strides) }
}

/// Read access to a contiguous tensor's elements.
pub(super) fn slice<'a, T: Stored, const RANK: usize>(name: &str, tensor: &'a Tensor) -> Result<&'a [T]> {
    check_on_cpu(name, tensor)?;
    check_strided::<RANK>(name, tensor, T::KIND)?;
    if !tensor.is_contiguous() {
        return Err(Error::Value(format!("{name}: expected a contiguous tensor")));
    }
    if tensor.numel() == 0 {
        return Ok(&[]);
    }
    // SAFETY: contiguous, non-empty, of T's dtype, on the CPU, and borrowed for 'a.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) })
}

/// The elements of contiguous tensors that a kernel changes in place, and that nothing else it reads or changes shares memory with.
pub(super) struct InPlace<'a> {
    /// Names and bytes of what has been handed out, or is read.
    taken: Vec<(&'static str, Range<usize>)>,
    tensors: PhantomData<&'a Tensor>,
}

impl<'a> InPlace<'a> {
    /// Beside tensors that are only read.
    pub(super) fn beside(read: &[(&'static str, TensorRef<'a>)]) -> Self {
        let taken = read.iter().map(|(name, tensor)| (*name, bytes_of(tensor))).collect();
        InPlace { taken, tensors: PhantomData }
    }

    /// The elements of `tensor`, for writing.
    ///
    /// # Errors
    /// [`Error::Dtype`], [`Error::Shape`], [`Error::Device`] or [`Error::Value`] naming the tensor; the last also where it shares
    /// memory with another.
    pub(super) fn elements<T: Stored, const RANK: usize>(
        &mut self,
        name: &'static str,
        tensor: TensorRef<'a>,
    ) -> Result<&'a mut [T]> {
        let elements = slice::<T, RANK>(name, tensor.tensor())?.len();
        let bytes = bytes_of(&tensor);
        let meets = |other: &Range<usize>| bytes.start < other.end && other.start < bytes.end;
        if let Some((other, _)) = self.taken.iter().find(|(_, other)| meets(other)) {
            return Err(Error::Value(format!(
                "{name}: expected memory of its own, got a tensor that shares it with {other}"
            )));
        }
        self.taken.push((name, bytes));
        if elements == 0 {
            return Ok(&mut []);
        }
        // SAFETY: `slice` checked that the tensor is a contiguous one of T's dtype on the CPU, borrowed for 'a, and no other slice or
        // view of this call overlaps it. Like torch's own in-place operators, the call relies on its caller not to use the tensor from
        // another thread meanwhile.
        Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), elements) })
    }
}

/// The addresses from the first to the last element of a tensor.
fn bytes_of(tensor: &Tensor) -> Range<usize> {
    let start = tensor.data_ptr() as usize;
    let size = tensor.size();
    if tensor.device() != Device::Cpu || size.contains(&0) {
        return start..start;
    }
    let last: i64 = size.iter().zip(tensor.stride()).map(|(side, stride)| (side - 1) * stride).sum();
    start..start + (last as usize + 1) * tensor.kind().elt_size_in_bytes()
}

/// A new contiguous CPU tensor that a kernel is about to fill.
pub(super) struct Output(Tensor);

impl Output {
    pub(super) fn new(shape: &[usize], kind: Kind) -> PyResult<Self> {
        let size: Vec<i64> = shape
            .iter()
            .map(|&side| {
                i64::try_from(side)
                    .map_err(|_| PyValueError::new_err(format!("shape {shape:?} is too large")))
            })
            .collect::<PyResult<_>>()?;
        Tensor::f_empty(&size, (kind, Device::Cpu)).map(Output).map_err(from_torch)
    }

    /// Its elements, for writing.
    pub(super) fn elements<T: Stored>(&mut self) -> &mut [T] {
        assert_eq!(self.0.kind(), T::KIND, "an output is filled in its own dtype");
        if self.0.numel() == 0 {
            return &mut [];
        }
        // SAFETY: made contiguous by `new`, of T's dtype, and not shared with anyone until `finish`. Every bit pattern is a valid
        // T, so that the memory is not yet written does no harm beyond its values, which the kernel replaces.
        unsafe { std::slice::from_raw_parts_mut(self.0.data_ptr().cast(), self.0.numel()) }
    }

    pub(super) fn finish(self) -> PyTensor {
        PyTensor(self.0)
    }
}

/// A new CPU tensor `(batch, head, token, channel)` that a kernel is about to fill. In memory it is as [`ViewMut4::merged_heads`] has
/// it, like the outputs of torch's own attention.
pub(super) struct HeadsOutput(Output);

impl HeadsOutput {
    pub(super) fn new([batch, heads, tokens, width]: [usize; 4], kind: Kind) -> PyResult<Self> {
        Output::new(&[batch, tokens, heads, width], kind).map(HeadsOutput)
    }

    /// Its heads, for writing. `name` is what errors call it.
    pub(super) fn heads<T: Stored>(&mut self, name: &str) -> Result<ViewMut4<'_, T>> {
        let size = self.0.0.size();
        let [batch, tokens, heads, width] = std::array::from_fn(|axis| size[axis] as usize);
        ViewMut4::merged_heads(name, self.0.elements(), [batch, heads, tokens, width])
    }

    pub(super) fn finish(self) -> PyResult<PyTensor> {
        self.0.0.f_transpose(1, 2).map(PyTensor).map_err(from_torch)
    }
}

/// The value of a seed tensor (int64, one element).
pub(super) fn seed_value(seed: &Tensor) -> PyResult<u64> {
    if seed.numel() != 1 || seed.kind() != Kind::Int64 {
        return Err(PyValueError::new_err(format!(
            "seed: expected one torch.int64 value, got {} of {}",
            seed.numel(),
            dtype_name(seed.kind())
        )));
    }
    seed.f_int64_value(&vec![0; seed.dim()])
        .map(|value| value as u64)
        .map_err(|e| PyRuntimeError::new_err(e.to_string()))
}

/// A Python list's worth of int64 as a tensor.
pub(super) fn int64_tensor(values: &[i64], shape: &[i64]) -> PyResult<PyTensor> {
    let tensor =
        Tensor::f_from_slice(values).and_then(|tensor| tensor.f_reshape(shape)).map_err(from_torch)?;
    Ok(PyTensor(tensor))
}

/// A plain tensor of doubles.
pub(super) fn double_tensor(values: &[f64], shape: &[i64]) -> PyResult<PyTensor> {
    let tensor =
        Tensor::f_from_slice(values).and_then(|tensor| tensor.f_reshape(shape)).map_err(from_torch)?;
    Ok(PyTensor(tensor))
}
