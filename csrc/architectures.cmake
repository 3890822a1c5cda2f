# Sets `result` to the architectures to compile for: sm_80 with its PTX, which the driver compiles for
# other GPUs at the first call, and those of the GPUs of this machine, of which `capabilities` has a
# line each, as far as nvcc knows them.
function(pfgm_architectures result capabilities supported)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" present "${capabilities}")
  list(TRANSFORM present REPLACE "\\." "")
  list(REMOVE_DUPLICATES present)
  set(architectures 80)
  foreach(architecture IN LISTS present)
    if(architecture GREATER 80 AND supported MATCHES "compute_${architecture}(\n|$)")
      list(APPEND architectures ${architecture}-real)
    endif()
  endforeach()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()
