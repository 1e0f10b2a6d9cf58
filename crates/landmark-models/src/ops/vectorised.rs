//! Functions compiled for several generations of the machine, the best of which is chosen at run time.

/// Declares a function whose loops use the widest vectors that the machine has: its body is compiled for AVX-512, for AVX2 and
/// for the baseline. A macro, because a body that is merely *called* from code with vector instructions uses none unless it is
/// inlined there, which nothing guarantees of a closure.
macro_rules! vectorised {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<$t:ident: $kind:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name<$t: $kind>($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma")]
                fn avx512<$t: $kind>($($arg: $ty),*) $(-> $ret)? $body

                #[target_feature(enable = "avx2,fma")]
                fn avx2<$t: $kind>($($arg: $ty),*) $(-> $ret)? $body

                let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let has_avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512cd")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                if has_avx2 && has_avx512 {
                    // SAFETY: the machine has every feature that the function enables.
                    return unsafe { avx512::<$t>($($arg),*) };
                }
                if has_avx2 {
                    // SAFETY: the machine has every feature that the function enables.
                    return unsafe { avx2::<$t>($($arg),*) };
                }
            }
            $body
        }
    };
}
pub(super) use vectorised;
