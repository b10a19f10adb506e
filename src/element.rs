//! Element types as Rust types.

use half::{bf16, f16};

use crate::{ElementType, Error};
use kv_cache_actors::batch::HostTensor;
use kv_cache_actors::memory::Elements;

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for f32 {}
}

/// A key or value element: [`half::f16`], [`half::bf16`] or `f32`.
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The type's name in a geometry.
    const TYPE: ElementType;
    #[doc(hidden)]
    fn from_elements(elements: Elements) -> Option<Vec<Self>>;
}

impl Element for f16 {
    const TYPE: ElementType = ElementType::F16;
    fn from_elements(elements: Elements) -> Option<Vec<Self>> {
        match elements {
            Elements::Half(bits) => Some(bytemuck::allocation::cast_vec(bits)),
            Elements::Single(_) => None,
        }
    }
}

impl Element for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
    fn from_elements(elements: Elements) -> Option<Vec<Self>> {
        match elements {
            Elements::Half(bits) => Some(bytemuck::allocation::cast_vec(bits)),
            Elements::Single(_) => None,
        }
    }
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
    fn from_elements(elements: Elements) -> Option<Vec<Self>> {
        match elements {
            Elements::Single(values) => Some(values),
            Elements::Half(_) => None,
        }
    }
}

pub(crate) fn tensor<T: Element>(elements: &[T]) -> HostTensor<'_> {
    HostTensor { element: T::TYPE, bytes: bytemuck::cast_slice(elements) }
}

/// Refuses to hand out elements of `stored` type as `T`.
pub(crate) fn check_type<T: Element>(stored: ElementType) -> Result<(), Error> {
    if T::TYPE == stored { Ok(()) } else { Err(Error::ElementType { given: T::TYPE, expected: stored }) }
}
