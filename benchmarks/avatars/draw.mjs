// Writes avatars of one style to standard output, as bytes R, G, B of SIZE x SIZE pixels on white, or
// without SIZE their attributes, such as hair and its colour, a line of JSON for each:
//
//     node draw.mjs STYLE FIRST COUNT [SIZE]
//
// An avatar depends on its style and number alone. Seeds are hashed because avatars of similar seeds
// have many parts in common.
import * as collection from '@dicebear/collection';
import { createAvatar } from '@dicebear/core';
import { Resvg } from '@resvg/resvg-js';
import { createHash } from 'node:crypto';

const [style, first, count, size] = process.argv.slice(2);
const design = collection[style.replace(/-(.)/g, (_, letter) => letter.toUpperCase())];
const options = { background: 'white', fitTo: { mode: 'width', value: Number(size) } };

for (let number = Number(first); number < Number(first) + Number(count); number++) {
  const seed = createHash('sha256').update(`${style} ${number}`).digest('hex');
  const avatar = createAvatar(design, { seed });
  if (size === undefined) {
    process.stdout.write(JSON.stringify(avatar.toJson().extra) + '\n');
    continue;
  }
  const { pixels } = new Resvg(avatar.toString(), options).render();
  const rgb = Buffer.alloc((pixels.length / 4) * 3);
  for (let pixel = 0; pixel < pixels.length / 4; pixel++) {
    pixels.copy(rgb, 3 * pixel, 4 * pixel, 4 * pixel + 3);
  }
  if (!process.stdout.write(rgb)) {
    await new Promise((resolve) => process.stdout.once('drain', resolve));
  }
}
