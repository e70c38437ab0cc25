-- ARGV: owner (nonce and fence), lease in microseconds.
--
-- A lease of zero gives the key up, which wakes waiters. Only the owner changes a claim (I8).
if state ~= IN_FLIGHT or string.sub(bytes, 37, 60) ~= ARGV[1] then return {key, 'superseded'} end
lease = tonumber(ARGV[2])
ends = now + lease
expires = ends + retention
reply, wakes = {key, 'renewed'}, lease == 0
